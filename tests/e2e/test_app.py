"""An app on in-process nodes: hooks in their order, leader changes, health, stepping down, barring."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import until

from phalanx import (
    ActiveContext,
    App,
    Backoff,
    ConfigError,
    Fenced,
    FunctionCheck,
    HookTimeouts,
    LeaderChange,
    NotActive,
    Platform,
    Role,
)
from phalanx.bus.connection import NatsBus
from phalanx.names import LEADER_KEY, Names
from phalanx.testing.nats import NatsServer


@asynccontextmanager
async def node(
    nats: NatsServer,
    tmp_path: Path,
    name: str = "n1",
    set_up: Callable[[App], None] | None = None,
    **app: Any,
) -> AsyncIterator[tuple[Platform, App]]:
    """One node in this process, with one app."""
    platform = Platform(
        "test",
        node=name,
        nats=nats.urls,
        data_dir=str(tmp_path / name),
        http={"enabled": False},
        timings={"ttl": 2},
    )
    declared = platform.app("wiki", **app)
    if set_up is not None:
        set_up(declared)
    async with platform:
        yield platform, declared


async def test_g7_hooks_run_in_their_order(nats_server: NatsServer, tmp_path: Path) -> None:
    """start, active, (leader change), health change; at the end active's end, passive, stop."""
    calls = list[str]()

    def set_up(app: App) -> None:
        app.on_start(lambda ctx: calls.append(f"start {ctx.node}"))

        @app.on_active
        async def active(ctx: ActiveContext) -> None:
            calls.append(f"active {ctx.epoch}")
            ctx.ready()
            await ctx.cancelled.wait()
            calls.append("active ends")

        app.on_passive(lambda ctx: calls.append(f"passive {ctx.epoch}"))
        app.on_leader_change(lambda change: calls.append(f"leader {change.leader}"))
        app.on_stop(lambda: calls.append("stop"))

    async with node(nats_server, tmp_path, set_up=set_up) as (platform, app):
        await platform.wait_for_role("wiki", Role.ACTIVE)
        epoch = app.epoch
        await until(lambda: "leader n1" in calls)
    assert [c for c in calls if c != "leader None"] == [
        "start n1",
        f"active {epoch}",
        "leader n1",
        "active ends",
        f"passive {epoch}",
        "stop",
    ]


async def test_g7_failing_hook_leaves_the_app_not_active(nats_server: NatsServer, tmp_path: Path) -> None:
    """on_active raises: never active, tried again after growing delays."""
    tries = list[float]()

    def set_up(app: App) -> None:
        @app.on_active
        async def active(ctx: ActiveContext) -> None:
            tries.append(asyncio.get_running_loop().time())
            raise RuntimeError("no")

    retry = Backoff(first=0.1, factor=2.0, longest=5.0)
    async with node(nats_server, tmp_path, set_up=set_up, retry=retry) as (_, app):
        async with asyncio.timeout(10):
            while len(tries) < 4:
                assert app.role is not Role.ACTIVE
                await asyncio.sleep(0.005)
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert gaps[0] >= 0.1
    assert gaps[1] >= 0.2
    assert gaps[2] >= 0.4


async def test_g7_overrunning_hook_leaves_the_app_not_active(nats_server: NatsServer, tmp_path: Path) -> None:
    """on_active neither returns nor says that it is ready: cancelled after its deadline."""
    ended = asyncio.Event()

    def set_up(app: App) -> None:
        @app.on_active
        async def active(ctx: ActiveContext) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

    async with node(nats_server, tmp_path, set_up=set_up, hook_timeouts=HookTimeouts(on_active=0.2)) as (
        _,
        app,
    ):
        await asyncio.wait_for(ended.wait(), 10)
        assert app.role is not Role.ACTIVE


async def test_step_down_hands_over_to_the_named_node(nats_server: NatsServer, tmp_path: Path) -> None:
    """step_down(to=...): that node is active next, with a larger epoch; writes of the old one are fenced."""
    contexts = dict[str, ActiveContext]()
    changes = list[LeaderChange]()

    def set_up(app: App) -> None:
        app.on_active(lambda ctx: contexts.__setitem__(ctx.node, ctx))
        app.on_leader_change(changes.append)

    async with (
        node(nats_server, tmp_path, "n1", set_up) as (one, app1),
        node(nats_server, tmp_path, "n2", set_up) as (two, app2),
        node(nats_server, tmp_path, "n3", set_up) as (three, app3),
    ):
        await one.wait_for_role("wiki", Role.ACTIVE)
        await two.wait_for_role("wiki", Role.STANDBY)
        await three.wait_for_role("wiki", Role.STANDBY)
        await asyncio.sleep(0)
        old = contexts["n1"]
        await old.kv.put("x", "old")
        with pytest.raises(ConfigError, match="n9"):
            await app1.step_down(to="n9")
        assert app1.is_active
        await until(lambda: "n3" in {c.session.node for c in app1.candidates()})
        assert await app1.step_down("maintenance", to="n3") == "n3"
        await three.wait_for_role("wiki", Role.ACTIVE)
        assert app3.epoch > old.epoch
        with pytest.raises(Fenced):
            await old.kv.put("x", "too late")
        entry = await app2.kv.get("x", str)
        assert entry is not None
        assert entry.value == "old"
        with pytest.raises(NotActive):
            _ = app1.epoch
        with pytest.raises(NotActive):
            await app1.step_down()
        await until(lambda: any(c.leader == "n3" for c in changes))
        assert any(c.leader is None and "maintenance" in c.reason for c in changes)


async def test_unhealthy_active_node_steps_down(nats_server: NatsServer, tmp_path: Path) -> None:
    """A check that fails on the active node ends its section; the other node takes over."""
    sick = {"n1": False, "n2": False}

    def check(name: str) -> FunctionCheck:
        return FunctionCheck(lambda: not sick[name], interval=0.05, failures=2, when="always")

    async with (
        node(nats_server, tmp_path, "n1", checks=[check("n1")]) as (one, app1),
        node(nats_server, tmp_path, "n2", checks=[check("n2")]) as (two, app2),
    ):
        await one.wait_for_role("wiki", Role.ACTIVE)
        await two.wait_for_role("wiki", Role.STANDBY)
        sick["n1"] = True
        await two.wait_for_role("wiki", Role.ACTIVE, timeout=10)
        await one.wait_for_role("wiki", Role.INELIGIBLE, timeout=10)
        assert "unhealthy" in app1.status().reason
        sick["n1"] = False
        await one.wait_for_role("wiki", Role.STANDBY, timeout=10)
        assert app2.is_active


async def test_failing_on_start_bars_the_node(nats_server: NatsServer, tmp_path: Path) -> None:
    """A node whose on_start failed is no candidate, and says why."""

    def set_up(app: App) -> None:
        @app.on_start
        async def start(ctx: object) -> None:
            raise RuntimeError("no licence")

    async with node(nats_server, tmp_path, "n1", set_up) as (one, app1):
        await one.wait_for_role("wiki", Role.INELIGIBLE)
        assert "no licence" in app1.status().reason
        async with node(nats_server, tmp_path, "n2") as (two, _):
            await two.wait_for_role("wiki", Role.ACTIVE)


async def test_members_tell_who_is_there(nats_server: NatsServer, tmp_path: Path) -> None:
    """Labels, version, apps, since when; a node that left gracefully is gone from the list."""
    async with node(nats_server, tmp_path, "n1") as (one, _):
        async with node(nats_server, tmp_path, "n2") as (two, _):
            await two.wait_for_role("wiki", Role.STANDBY)
            await until(lambda: set(one.live_members()) == {"n1", "n2"})
            member = one.members()["n2"]
            assert member.apps == ("wiki",)
            assert member.version
            assert member.since > 0
        await until(lambda: set(one.members()) == {"n1"})


async def test_leader_key_that_comes_while_the_node_stops_does_not_keep_it(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G10: another app is still standing down when it comes. Its section ends, and so does the node."""
    names, real = Names("test"), NatsBus.write
    written, may_come, standing_down, may_end = (asyncio.Event() for _ in range(4))

    async def write(bus: NatsBus, subject: str, *arguments: Any, **options: Any) -> int:
        revision = await real(bus, subject, *arguments, **options)
        if subject == names.key_subject(names.app_bucket("late"), LEADER_KEY):
            written.set()
            await may_come.wait()
        return revision

    monkeypatch.setattr(NatsBus, "write", write)
    platform = Platform("test", node="n1", nats=nats_server.urls, data_dir=str(tmp_path))
    late, slow = platform.app("late"), platform.app("slow")

    @slow.on_active
    async def until_told(ctx: ActiveContext) -> None:
        ctx.ready()
        await ctx.cancelled.wait()
        standing_down.set()
        await may_end.wait()

    await platform.start()
    try:
        await platform.wait_for_role("slow", Role.ACTIVE)
        await written.wait()
        stopping = asyncio.create_task(platform.stop())
        await standing_down.wait()
        may_come.set()
        await until(lambda: late.leader == "n1")
    finally:
        may_come.set()
        may_end.set()
    async with asyncio.timeout(20):
        await stopping
