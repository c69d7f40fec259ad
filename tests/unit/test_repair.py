"""Which node replaces a session stream that is lost."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from tests.waiting import until

from phalanx.coord.repair import Repair
from phalanx.decide.session import StreamList
from phalanx.errors import BusUnavailable
from phalanx.names import Names
from phalanx.types import Member, SessionId

NAMES = Names("prod")
LIST = StreamList(1, tuple(NAMES.session_stream(number) for number in (1, 2, 3)))
NODE, OTHER, CLIENT = SessionId("n1", "a"), SessionId("n2", "b"), SessionId("client-host-1", "c")


class Platform:
    """Bus, state, register and journal of a platform whose first session stream does not answer."""

    streams, me = LIST, NODE

    def __init__(self) -> None:
        self.members = {each.node: Member(each.node, each, 0.0, "0") for each in (NODE, OTHER)}
        self.lists: list[StreamList] = []

    def live(self) -> list[SessionId]:
        return [NODE, OTHER, CLIENT]

    async def read(self, stream: str, subject: str, **_: Any) -> None:
        if stream == LIST.streams[0]:
            raise BusUnavailable("read", "nobody answers")

    async def api(self, what: str, *_: Any, **__: Any) -> dict[str, Any]:
        return {"cluster": {"leader": what}}

    async def write_streams(self, streams: StreamList, _: int) -> bool:
        self.lists.append(streams)
        return True

    def platform(self, *_: Any, **__: Any) -> None:
        pass


async def place(_: str, __: set[str]) -> str | None:
    return "s4"


async def test_session_of_a_client_leaves_the_repair_to_the_nodes() -> None:
    """A client's session comes before those of the nodes: the first of the nodes begins all the same."""
    made: Any = Platform()
    running = asyncio.create_task(Repair(made, NAMES, made, made, made, place, after_seconds=0.04).run())
    try:
        await until(lambda: bool(made.lists))
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert made.lists[0].is_joint
