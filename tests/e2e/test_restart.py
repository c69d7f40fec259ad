"""Programs that end or fall ill are restarted in place first; real programs on nodes in this process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.waiting import until

from phalanx import (
    ActivePassive,
    App,
    Backoff,
    FunctionCheck,
    NatsOptions,
    Platform,
    Process,
    Restart,
    Role,
)
from phalanx.client import PlatformClient
from phalanx.observe.audit import AuditEntry
from phalanx.testing.nats import NatsServer
from phalanx.types import Health


@asynccontextmanager
async def node(nats: NatsServer, tmp_path: Path, name: str, **app: Any) -> AsyncGenerator[App]:
    """One node in this process, with one app."""
    platform = Platform(
        "test",
        node=name,
        nats=nats.urls,
        data_dir=str(tmp_path / name),
        http={"enabled": False},
        timings={"ttl": 2},
    )
    declared = platform.app("wiki", ActivePassive(priority=-int(name[1:])), **app)
    async with platform:
        yield declared


def shell(script: str) -> Process:
    """A program of the shell."""
    return Process(["/bin/sh", "-c", script])


def dies(marks: Path, seconds: float = 0.1, times: int = 1000) -> Process:
    """A program that notes each start in a file, and ends *seconds* later, the first so many times."""
    return shell(
        f"echo $PHALANX_EPOCH $PHALANX_NODE >> {marks}; "
        f"test $(wc -l < {marks}) -gt {times} && exec sleep 1000; sleep {seconds}; exit 3"
    )


async def audited(nats: NatsServer) -> list[AuditEntry]:
    """The audit log of the app so far."""
    async with PlatformClient("test", NatsOptions(urls=tuple(nats.urls))) as client:
        return [entry for entry in await client.audit(limit=1000) if entry.category == "app"]


def starts(marks: Path) -> list[tuple[int, str]]:
    """Epoch and node of each start of the program."""
    lines = marks.read_text().splitlines() if marks.exists() else []
    return [(int(epoch), node) for epoch, node in (line.split() for line in lines)]


async def test_program_that_ends_is_restarted_in_place_and_all_of_it_reported(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Two crashes, the third start holds: same node, same epoch; audit log, status and metric say so."""
    marks = tmp_path / "marks"
    options = {"backend": dies(marks, times=2), "restart": Restart(delay=0.05)}
    async with (
        node(nats_server, tmp_path, "n1", **options) as first,
        node(nats_server, tmp_path, "n2", **options) as second,
    ):
        await until(lambda: len(starts(marks)) == 3)
        await until(lambda: (program := first.status().program) and program.restarts == 2)
        assert first.is_active
        assert second.role is Role.STANDBY
        assert first.status().reason == ""
        assert set(starts(marks)) == {(first.epoch, "n1")}
        counters = first._running_parts.view.metrics().decode()  # pyright: ignore
        assert 'phalanx_backend_restarts_total{platform="test",node="n1",app="wiki"} 2' in counters
        await asyncio.sleep(0.3)
    entries = [e for e in await audited(nats_server) if "restart" in e.action or "ended" in e.action]
    assert [e.action for e in entries] == ["backend-ended", "restarting", "restarted"] * 2
    assert entries[0].reason == "exited with code 3"
    assert "restart 1 of 2 within 600 s; in 0.05 s" in entries[1].reason
    assert "restart 2 of 2 within 600 s; in 0.1 s" in entries[4].reason


async def test_program_that_goes_on_failing_moves_to_another_node_and_stays_there(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Ends after 0.1 s on n1 only, once n2 is there: two restarts, one failover, and none back."""
    marks, go = tmp_path / "marks", tmp_path / "go"
    failing = shell(
        f"echo $PHALANX_EPOCH $PHALANX_NODE >> {marks}; "
        f"until test -e {go}; do sleep 0.02; done; sleep 0.1; exit 3"
    )
    options = {"restart": Restart(delay=0.05), "retry": Backoff(first=0.1)}
    async with (
        node(nats_server, tmp_path, "n1", backend=failing, **options) as first,
        node(nats_server, tmp_path, "n2", backend=shell("exec sleep 1000"), **options) as second,
    ):
        await until(lambda: first.is_active and first.others_can())
        go.touch()
        await until(lambda: second.is_active)
        await until(lambda: first.role is Role.STANDBY)
        await asyncio.sleep(1.0)
        assert second.is_active
        assert len(starts(marks)) == 3
        actions = Counter(entry.action for entry in await audited(nats_server))
    assert (actions["restarting"], actions["section-failed"], actions["active"]) == (2, 1, 2)


async def test_program_that_fails_on_all_nodes_slows_down(nats_server: NatsServer, tmp_path: Path) -> None:
    """Ends after 0.05 s everywhere, delays up to 0.5 s and 2 s: restarts and failovers of 8 s are bounded."""
    marks = tmp_path / "marks"
    options = {
        "backend": dies(marks, 0.05),
        "restart": Restart(delay=0.05, longest_delay=0.5),
        "retry": Backoff(first=0.1, longest=2.0),
    }
    async with (
        node(nats_server, tmp_path, "n1", **options),
        node(nats_server, tmp_path, "n2", **options),
    ):
        await until(lambda: len(starts(marks)) > 3)
        seen = len(await audited(nats_server))
        await asyncio.sleep(8.0)
        entries = (await audited(nats_server))[seen:]
        actions = Counter(entry.action for entry in entries)
        # Each node steps aside for 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2 s: less than 10 times in 8 s; meanwhile the
        # other one restarts in place, each 0.55 s.
        assert 3 <= actions["section-failed"] <= 14, actions
        assert 6 <= len(starts(marks)) <= 40, actions
        late = [e for e in entries if e.action == "section-failed" and e.time > entries[0].time + 4.0]
        assert len(late) <= 6


async def test_program_that_fails_where_nobody_else_is_goes_on_in_place(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The only node: beyond its count it restarts with the longest delay, under the same epoch; when another
    node comes, that takes over."""
    marks = tmp_path / "marks"
    options = {"restart": Restart(count=1, delay=0.05, longest_delay=0.2)}
    async with node(nats_server, tmp_path, "n1", backend=dies(marks), **options) as first:
        await until(lambda: len(starts(marks)) >= 5)
        assert len(set(starts(marks))) == 1
        assert first.is_active
        async with node(nats_server, tmp_path, "n2", backend=shell("exec sleep 1000")) as second:
            await until(lambda: second.is_active)


async def test_count_of_none_fails_over_at_once(nats_server: NatsServer, tmp_path: Path) -> None:
    """restart.count = 0: the first crash moves the app."""
    marks, go = tmp_path / "marks", tmp_path / "go"
    options: dict[str, Any] = {"restart": Restart(count=0)}
    failing = shell(f"echo $PHALANX_EPOCH n1 >> {marks}; until test -e {go}; do sleep 0.02; done; exit 3")
    async with (
        node(nats_server, tmp_path, "n1", backend=failing, **options) as first,
        node(nats_server, tmp_path, "n2", backend=shell("exec sleep 1000"), **options) as second,
    ):
        await until(lambda: first.is_active and first.others_can())
        go.touch()
        await until(lambda: second.is_active)
        assert len(starts(marks)) == 1


async def test_ill_program_is_restarted_and_its_old_verdict_does_not_count(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A check of the active section fails until the program is started anew; a second illness too."""
    marks = tmp_path / "marks"
    bad = {1, 2}
    check = FunctionCheck(lambda: len(starts(marks)) not in bad, interval=0.05, failures=2)
    options = {"backend": dies(marks, 1000), "restart": Restart(delay=0.05), "checks": [check]}
    async with (
        node(nats_server, tmp_path, "n1", **options) as first,
        node(nats_server, tmp_path, "n2", **options) as second,
    ):
        await until(lambda: len(starts(marks)) == 3 and first.health.verdict is Health.HEALTHY)
        assert first.is_active
        bad.add(3)
        await until(lambda: second.is_active)
        # Without a ready check it is active before its shell has written that line.
        await until(lambda: [name for _, name in starts(marks)] == ["n1", "n1", "n1", "n2"])
    reasons = [e.reason for e in await audited(nats_server) if e.action == "restarting"]
    assert len(reasons) == 2
    assert all(reason.startswith("unhealthy: function: returned False") for reason in reasons)


async def test_illness_of_the_node_is_not_cured_by_a_restart(nats_server: NatsServer, tmp_path: Path) -> None:
    """A check that runs on standbys too fails on the active node: another one takes over at once."""
    marks = tmp_path / "marks"
    sick = set[str]()

    def options(name: str) -> dict[str, Any]:
        check = FunctionCheck(lambda: name not in sick, interval=0.05, failures=2, when="always")
        return {"backend": dies(marks, 1000), "checks": [check]}

    async with (
        node(nats_server, tmp_path, "n1", **options("n1")) as first,
        node(nats_server, tmp_path, "n2", **options("n2")) as second,
    ):
        await until(lambda: first.is_active and second.role is Role.STANDBY)
        # The shell of the program writes that down when it comes to run.
        await until(lambda: [name for _, name in starts(marks)] == ["n1"])
        sick.add("n1")
        await until(lambda: second.is_active)
        await until(lambda: [name for _, name in starts(marks)] == ["n1", "n2"])


async def test_program_that_does_not_get_ready_again_uses_its_restarts_up(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Ready once, then never: each failed restart counts, and the standby takes over; nothing is left."""
    marks, ready = tmp_path / "marks", tmp_path / "ready"
    ready.touch()
    script = f"echo $PHALANX_EPOCH n1 >> {marks}; while test -e {ready}; do sleep 0.02; done; exit 3"
    backend = Process(
        ["/bin/sh", "-c", script],
        ready={"type": "command", "command": f"test -e {ready}", "timeout": 0.2},  # type: ignore[arg-type]
        ready_timeout=5.0,
    )
    async with (
        node(nats_server, tmp_path, "n1", backend=backend, restart=Restart(delay=0.05)) as first,
        node(nats_server, tmp_path, "n2", backend=shell("exec sleep 1000")) as second,
    ):
        await until(lambda: first.is_active and first.others_can())
        ready.unlink()
        await until(lambda: second.is_active)
        assert len(starts(marks)) == 3


async def test_section_that_ends_in_the_middle_of_a_restart_leaves_nothing(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Asked to step down during the delay: the other node is active at once, one program runs."""
    marks = tmp_path / "marks"
    restart = Restart(delay=30.0, longest_delay=30.0)
    async with (
        node(nats_server, tmp_path, "n1", backend=dies(marks), restart=restart) as first,
        node(nats_server, tmp_path, "n2", backend=shell("exec sleep 1000"), restart=restart) as second,
    ):
        await until(lambda: first.status().reason.startswith("its program is being restarted"))
        await until(first.others_can)
        async with asyncio.timeout(5):
            assert await first.step_down() == "n2"
        await until(lambda: second.is_active)
        assert len(starts(marks)) == 1
