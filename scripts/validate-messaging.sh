#!/usr/bin/env bash
# Calls, events, locks, semaphores and a ring under load, while nodes, keepers, clients and NATS servers are killed and
# apps handed over; checked afterwards over the whole history: nothing ran twice, no deposed leader answered, nothing
# that was acknowledged is lost, nothing was held by too many, no partition had two owners.
#
#   scripts/validate-messaging.sh [--seconds 120] [--seed N] [--ttl 2] [--keep]
#
# Exit code 0: every promise was kept; 1: one was broken; 2: bad arguments.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || { echo "there is no .venv yet: run make setup" >&2; exit 2; }
exec "$python" -m benchmarks.messaging_validation "$@"
