"""``scripts/validate-replication.sh``: kills of whatever has to do with a database, under load, and a
judgement of the whole history afterwards (``python -m benchmarks.replication_validation``)."""
