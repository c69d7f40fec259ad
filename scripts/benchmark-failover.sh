#!/usr/bin/env bash
# How long failovers take on this machine: every failover.* benchmark, with its bar, over real processes.
#
#   scripts/benchmark-failover.sh [NAME…] [--runs N] [--json]
#
# Exit code 0: every bar is met; 1: one is missed; 2: bad arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || { echo "there is no .venv yet: run make setup" >&2; exit 2; }

names=("failover.*")
for argument in "$@"; do
    case $argument in
        failover.*) names=() ;; # chosen by name
    esac
done
exec "$python" -m benchmarks ${names[@]+"${names[@]}"} "$@"
