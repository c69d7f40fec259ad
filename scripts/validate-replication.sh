#!/usr/bin/env bash
# Kills at random moments of a database's writer, its Litestream, its keeper, followers and NATS servers, over
# real processes and under load, checked afterwards: nothing that a barrier has confirmed is lost, every other
# loss is kept and reported with its number, all databases are sound, and the same byte for byte.
#
#   scripts/validate-replication.sh [--failovers 30] [--seconds 900] [--seed N] [--ttl 2] [--keep]
#
# Exit code 0: every promise was kept; 1: one was broken; 2: bad arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || { echo "there is no .venv yet: run make setup" >&2; exit 2; }
exec "$python" -m benchmarks.replication_validation "$@"
