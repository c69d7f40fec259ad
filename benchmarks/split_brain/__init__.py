"""``scripts/validate-split-brain.sh``: five hosts, every kind of network fault, freezes and kills, and a
judgement of what clients were answered (``python -m benchmarks.split_brain``)."""
