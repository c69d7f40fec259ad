"""How long sections have to end when their session is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from phalanx import guard, system
from phalanx.coord.hold import Holds
from phalanx.coord.session import Session
from phalanx.decide.hold import MemberList
from phalanx.decide.timing import Timing
from phalanx.guard import Guard
from phalanx.types import SessionId

TIMING = Timing.of(10.0)
SESSION = SessionId("n1", "a")


class Section:
    """An app whose section ends so long after it was fenced."""

    has_section = True

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self._seconds = name, seconds
        self._ended = asyncio.Event()

    def fence(self, reason: str) -> None:
        """See App."""
        asyncio.get_running_loop().call_later(self._seconds, self._ended.set)

    async def wait_ended(self) -> None:
        """See App."""
        await self._ended.wait()


@pytest.mark.parametrize(("held", "plain", "dies"), [(1.0, 0.0, False), (0.0, 30.0, True), (30.0, 0.0, True)])
async def test_section_that_is_held_has_as_long_to_end_as_its_promises_reach(
    monkeypatch: pytest.MonkeyPatch, held: float, plain: float, dies: bool
) -> None:
    """The keeper dies during a hold: what is held is no reason to end the node at once, what is not is."""
    deaths: list[str] = []

    def die(journal: object, reason: str) -> None:
        deaths.append(reason)

    monkeypatch.setattr(guard, "die", die)
    session, holds = Session(SESSION, TIMING), Holds(TIMING, "n1", lambda app: True)
    session.valid_until = system.now() - 5.0
    claim = holds.begin("wiki", 5, session)
    claim.on_list(7, MemberList({"n1": "a:1", "n2": "b:1"}, 10.0))
    now = system.now()
    claim.on_promise("n2", now, now, now + 1.0)
    apps: Any = [Section("shop", plain), Section("wiki", held)]
    nothing: Any = None
    began = system.now()
    await Guard(apps, session, holds, TIMING, nothing, nothing).fence_all("the keeper is gone")
    assert bool(deaths) is dies
    if plain:
        assert system.now() - began < guard.FENCE_WAIT_SECONDS
