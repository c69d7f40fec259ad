#!/usr/bin/env bash
# What replication of databases costs on this machine: every benchmark of it, with its bar, over real processes.
#
#   scripts/benchmark-replication.sh [NAME…] [--runs N] [--json]
#
# Exit code 0: every bar is met; 1: one is missed; 2: bad arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || { echo "there is no .venv yet: run make setup" >&2; exit 2; }

names=("replication.*" failover.data failover.lost "snapshot.*")
for argument in "$@"; do
    case $argument in
        replication.* | failover.* | snapshot.*) names=() ;; # chosen by name
    esac
done
exec "$python" -m benchmarks ${names[@]+"${names[@]}"} "$@"
