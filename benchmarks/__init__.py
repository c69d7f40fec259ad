"""``python -m benchmarks``: what Phalanx shows, measured on real processes and real nats-servers.

Times between events of different processes come from one clock that all of them share
(``phalanx.system.now()``), written down by the processes themselves; nothing is timed by polling.
"""
