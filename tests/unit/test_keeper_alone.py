"""A keeper that is alone in a pause: what it goes on with, and what not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from phalanx.decide.keeper import Fencing, Watchdog
from phalanx.decide.timing import Timing
from phalanx.keeper import wire
from phalanx.keeper.fencing import Registry
from phalanx.keeper.holding import Holding
from phalanx.keeper.link import NodeLink
from phalanx.keeper.wishes import Wishes
from phalanx.types import Resource, SessionId


async def test_g1_what_a_dying_node_begins_at_the_last_moment_is_ended_too(
    tmp_path: Path,
) -> None:
    """A frozen node wakes up while its keeper ends what is not paused, and registers a unit of that."""
    kept, other, late = (
        Resource("unit", name, app, 1, adoptable=True)
        for name, app in (("kept", "paused"), ("other", "wiki"), ("late", "wiki"))
    )
    registry, ended = Registry(tmp_path), list[str]()

    async def end(resources: list[Resource], *, kill_node: bool) -> None:
        if kill_node:
            registry.add(late)
        for resource in resources:
            ended.append(resource.id)
            registry.remove(resource.id)

    wishes = Wishes()
    wishes.keep = wire.Keep(("paused",), ("wiki",))
    registry.add(kept)
    registry.add(other)
    start: Any = SimpleNamespace(platform="test", session=SessionId.new("n1"), state_dir=str(tmp_path))
    renewer: Any = SimpleNamespace(bus=None)
    ending: Any = SimpleNamespace(end_resources=end, prolong_addresses=lambda: None)
    link = NodeLink(os.getpid(), lambda message: None, lambda: None)
    watchdog = Watchdog(Timing.of(2.0), 0.0)
    told = list[int | None]()
    wardens: Any = SimpleNamespace(on_node=told.append)
    holding = Holding(start, renewer, watchdog, registry, link, wishes, ending, wardens, asyncio.Event())
    try:
        await holding._be_alone(Fencing("it stood still", kill_node=True))
    finally:
        holding._end_absence()  # pyright: ignore
        await asyncio.sleep(0)
    assert ended == ["other", "late"]
    assert told == [None]
    assert registry.resources == [kept]
