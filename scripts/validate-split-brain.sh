#!/usr/bin/env bash
# Network faults of every kind, freezes and kills on five hosts (network namespaces on a switch), three of them with
# a NATS server. Clients on several hosts record every answer; checked afterwards: never did two answer, no epoch
# went back, everything that a barrier has confirmed is there, and the majority was served.
#
#   scripts/validate-split-brain.sh [--seconds 600] [--seed N] [--ttl 2] [--available 80] [--no-vip] [--keep]
#
# Needs root, iproute2 and nftables; the machine's own network is not touched.
# Exit code 0: every promise was kept; 1: one was broken; 2: bad arguments, or no network namespaces here.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || { echo "there is no .venv yet: run make setup" >&2; exit 2; }
exec "$python" -m benchmarks.split_brain "$@"
