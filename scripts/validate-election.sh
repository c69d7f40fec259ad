#!/usr/bin/env bash
# Random kills, freezes, cut-offs and losses of NATS servers over real processes, checked afterwards: no two
# active nodes at once, epochs grow, old leaders write nothing, no acknowledged write is lost, all comes back.
#
#   scripts/validate-election.sh [--seconds 60] [--seed N] [--ttl 2] [--keep]
#
# Exit code 0: every promise was kept; 1: one was broken; 2: bad arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || { echo "there is no .venv yet: run make setup" >&2; exit 2; }
exec "$python" -m benchmarks.validation "$@"
