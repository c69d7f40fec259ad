"""What the keeper and the alarm know of the partitions of a ring, from the first to the last."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from phalanx.app.presence import SharedPresence
from phalanx.errors import SessionLost
from phalanx.types import Resource


class Parts:
    """A node that notes what it is told; its keeper answers when it is let."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.answers, self.is_lost = asyncio.Event(), False

    async def register(self, resource: Resource) -> None:
        """As the node."""
        self.lines.append(f"register {resource.kind} {resource.id}")
        await self.answers.wait()
        if self.is_lost:
            raise SessionLost("n1.1", "gone")

    def unregister(self, resource_id: str) -> None:
        """As the node."""
        self.lines.append(f"unregister {resource_id}")

    def section_begins(self) -> None:
        """As the node."""
        self.lines.append("begins")

    def section_has_ended(self) -> None:
        """As the node."""
        self.lines.append("ended")


async def test_g6_nothing_begins_before_the_keeper_knows_and_it_knows_until_the_last_has_ended() -> None:
    """One section for all that runs at a time."""
    parts: Any = Parts()
    presence = SharedPresence(parts, "sessions", "partitions")
    first, second = (asyncio.create_task(presence.enter()) for _ in range(2))
    await asyncio.sleep(0.05)
    assert not first.done()
    assert not second.done()
    assert parts.lines == ["begins", "register section sessions.partitions"]
    parts.answers.set()
    await asyncio.gather(first, second)
    presence.leave()
    assert len(parts.lines) == 2
    presence.leave()
    assert parts.lines[2:] == ["unregister sessions.partitions", "ended"]
    await presence.enter()
    assert parts.lines[4:] == ["begins", "register section sessions.partitions"]


async def test_lost_session_leaves_no_section_behind() -> None:
    """What cannot be registered does not begin, and the alarm is as it was."""
    parts: Any = Parts()
    parts.is_lost = True
    parts.answers.set()
    presence = SharedPresence(parts, "sessions", "partitions")
    with pytest.raises(SessionLost):
        await presence.enter()
    assert parts.lines == ["begins", "register section sessions.partitions", "ended"]
