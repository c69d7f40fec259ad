"""The benchmarks, their bars, and whom they are compared with."""

from __future__ import annotations

import functools

from benchmarks import failover, footprint, hosts, kv, servers, simulation
from benchmarks.figures import Benchmark, Peer

ETCD_CRASH = "etcd election, crash: its TTL, at least"
PATRONI_CRASH = "Patroni crash, from"

BENCHMARKS = (
    Benchmark(
        name="failover.sigkill",
        work="SIGKILL of the active node's process, default TTL, to on_active of another node",
        unit="ms",
        bar=75,
        measure=failover.sigkill,
        runs=20,
        peer=Peer(ETCD_CRASH, 2000),
    ),
    Benchmark(
        name="failover.stepdown",
        work="planned: end of the old on_active to begin of the new, three nats-servers",
        unit="ms",
        bar=10,
        measure=failover.stepdown,
        runs=20,
        peer=Peer("etcd election, planned", 12),
    ),
    Benchmark(
        name="failover.host",
        work="node, keeper and embedded nats-server (one of three) killed at once, TTL 2 s, to on_active",
        unit="s",
        bar=2.2,
        max_bar=2.5,
        measure=functools.partial(hosts.lose_hosts, ttl=2.0),
        runs=10,
        peer=Peer(ETCD_CRASH, 2.0),
    ),
    Benchmark(
        name="failover.host_default",
        work="the same with default timings (TTL 5 s)",
        unit="s",
        bar=5.4,
        measure=functools.partial(hosts.lose_hosts, ttl=failover.DEFAULT_TTL),
        runs=10,
        peer=Peer(PATRONI_CRASH, 20.0),
    ),
    Benchmark(
        name="failover.freeze",
        work="SIGSTOP of the active node for 3 x TTL (2 s): how long two sections were active at once",
        unit="ms",
        bar=0,
        max_bar=0,
        measure=failover.freeze,
        runs=5,
    ),
    Benchmark(
        name="failover.nats_server",
        work="SIGKILL of each nats-server in turn, TTL 2 s: failovers caused + acknowledged writes lost",
        unit="count",
        bar=0,
        max_bar=0,
        measure=servers.kill_in_turn,
        runs=10,
    ),
    Benchmark(
        name="kv.put",
        work="put of 128 bytes in the app's KV, one server; the bar is for the ratio to raw nats-py",
        unit="ms",
        bar=1.15,
        bar_of="ratio",
        measure=kv.put,
        runs=10,
    ),
    Benchmark(
        name="node.memory",
        work="RSS of node + keeper, 20 apps, idle, of each of three nodes (nats-servers apart)",
        unit="MB",
        bar=90,
        measure=footprint.memory,
        runs=3,
        fixed=True,
    ),
    Benchmark(
        name="node.idle_cpu",
        work="processor time of the same in 30 s, share of one core",
        unit="%",
        bar=2,
        measure=footprint.idle_cpu,
        runs=3,
        fixed=True,
    ),
    Benchmark(
        name="simulate",
        work="violations in 20,000 simulated schedules; planted rule breaks are found",
        unit="count",
        bar=0,
        max_bar=0,
        measure=simulation.simulate,
        runs=1,
        fixed=True,
    ),
)
