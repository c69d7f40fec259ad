"""A keeper that is alone in a pause: what it goes on with, and what not."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from phalanx.decide.keeper import Fencing, Watchdog
from phalanx.decide.timing import Timing
from phalanx.keeper import wire
from phalanx.keeper.fencing import Registry
from phalanx.keeper.process import Keeper
from phalanx.types import Resource, SessionId


async def test_g1_what_a_dying_node_begins_at_the_last_moment_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen node wakes up while its keeper ends what is not paused, and registers a unit of that."""
    kept, other, late = (
        Resource("unit", name, app, 1, adoptable=True)
        for name, app in (("kept", "paused"), ("other", "wiki"), ("late", "wiki"))
    )
    registry, ended = Registry(tmp_path), list[str]()

    async def end(*args: Any, kill_node: bool) -> None:
        if kill_node:
            registry.add(late)
        for resource in args[3]:
            ended.append(resource.id)
            registry.remove(resource.id)

    mine, theirs = socket.socketpair()
    with mine, theirs:
        keeper = Keeper(theirs, os.getpid(), cast("Any", None), cast("Any", None))
        monkeypatch.setattr(keeper, "_end_resources", end)
        monkeypatch.setattr(keeper, "_keep", wire.Keep(("paused",), ("wiki",)))
        registry.add(kept)
        registry.add(other)
        start: Any = SimpleNamespace(platform="test", session=SessionId.new("n1"), state_dir=str(tmp_path))
        renewer: Any = SimpleNamespace(bus=None)
        watchdog = Watchdog(Timing.of(2.0), 0.0)
        try:
            await keeper._be_alone(
                start, renewer, registry, watchdog, Fencing("it stood still", kill_node=True)
            )
        finally:
            keeper._close_door()  # pyright: ignore
            await asyncio.sleep(0)
    assert ended == ["other", "late"]
    assert registry.resources == [kept]
