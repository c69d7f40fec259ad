"""Replaces a session stream whose server is gone for good, while everything runs.

In two steps, as raft changes its members: a joint list, under which renewals and ends need a majority
of the old and of the new list; then, once every live session has been seen to renew under the joint
list, the new list alone. Every step is a compare-and-set on the list, so any node may do it, or go on
with what another has begun.

A server is taken to be gone for good when its stream has not answered for ``REPAIR_AFTER_SECONDS``
while a majority of the others did. A session stream holds nothing that outlives a TTL, so replacing
one whose server comes back later costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from phalanx import system
from phalanx.coord.membership import PlatformState
from phalanx.coord.register import Register
from phalanx.decide.session import StreamList
from phalanx.errors import BusError, NatsUnusable
from phalanx.names import Names
from phalanx.ports import Bus

log = logging.getLogger("phalanx.repair")

REPAIR_AFTER_SECONDS = float(os.environ.get("PHALANX_REPAIR_AFTER", "120"))
CHECK_SECONDS = 5.0


PlaceStream = Callable[[str, set[str]], Awaitable[str | None]]
"""Creates a session stream on a server that is not in the set; the server's name, None if that fails."""


class Journal(Protocol):
    """What the repair reports to."""

    def platform(self, action: str, reason: str = "", level: int = ..., **details: str) -> None: ...


class Repair:
    """One task of every node; compare-and-set decides whose step counts."""

    def __init__(
        self,
        bus: Bus,
        names: Names,
        state: PlatformState,
        register: Register,
        journal: Journal,
        place: PlaceStream,
        *,
        after_seconds: float = REPAIR_AFTER_SECONDS,
    ) -> None:
        self._bus, self._names, self._state = bus, names, state
        self._register, self._journal, self._place = register, journal, place
        self._after = after_seconds
        self._silent_since: dict[str, float] = {}

    async def run(self) -> None:
        """Look after the session streams until cancelled."""
        while True:
            await asyncio.sleep(min(CHECK_SECONDS, self._after / 4))
            streams = self._register.streams
            if len(streams.streams) < 3:
                continue  # one server, or one replicated stream: there is nothing to replace it from
            try:
                if streams.is_joint:
                    await self._settle(streams)
                elif self._is_my_turn():
                    await self._check(streams)
            except (BusError, NatsUnusable) as error:
                log.warning("session streams: %s", error)

    def _is_my_turn(self) -> bool:
        """Only one node begins, so that others do not make streams in vain. No safety rests on it."""
        # Of the nodes only: clients have sessions too, and repair nothing.
        nodes = {member.session for member in self._state.members.values()}
        live = sorted(nodes.intersection(self._register.live()))
        return bool(live) and self._register.me == live[0]

    async def _check(self, streams: StreamList) -> None:
        now = system.now()
        servers: dict[str, str] = {}
        for stream in streams.streams:
            server = await self._server_of(stream)
            if server is not None:
                servers[stream] = server
                self._silent_since.pop(stream, None)
            else:
                self._silent_since.setdefault(stream, now)
        lost = [
            s
            for s, since in self._silent_since.items()
            if s in streams.streams and now - since >= self._after
        ]
        if len(lost) != 1 or len(servers) <= len(streams.streams) // 2:
            return
        await self._begin(streams, lost[0], set(servers.values()))

    async def _server_of(self, stream: str) -> str | None:
        """The server that holds *stream* and answers for it; None while none does."""
        try:
            await self._bus.read(
                stream, self._names.session_subjects(stream).replace(">", "probe.probe"), timeout=1.0
            )
            info: dict[str, Any] = await self._bus.api(f"STREAM.INFO.{stream}", {}, timeout=1.0)
        except BusError:
            return None
        cluster: dict[str, Any] = info.get("cluster") or {}
        return str(cluster.get("leader") or "") or None

    async def _begin(self, streams: StreamList, lost: str, used: set[str]) -> None:
        numbers = [self._names.session_number(name) for name in streams.all_streams]
        fresh = self._names.session_stream(max(numbers) + streams.generation)
        server = await self._place(fresh, used)
        if server is None:
            log.warning("session stream %s is lost, and there is no other server for a new one", lost)
            return
        following = tuple(fresh if name == lost else name for name in streams.streams)
        joint = streams.joint_with(following)
        if await self._state.write_streams(joint, streams.generation):
            self._journal.platform(
                "session-stream-replacing",
                f"{lost} has not answered for {self._after:g} s",
                by=fresh,
                on=server,
            )

    async def _settle(self, streams: StreamList) -> None:
        """The second step, once every live session renews under the joint list."""
        # Since the joint list was written: a session that was made just before it must not be overlooked.
        # (Of the old list the lost stream cannot be read any more: a majority must do, and each session
        # has its key in a majority.)
        if not all(self._register.caught_up(name) for name in streams.following):
            return
        if not self._register.has_caught_up_majority():
            return
        waiting = [s for s in self._register.live() if self._register.seen_generation(s) < streams.generation]
        if waiting:
            log.info("session streams: waiting for %s to use the new list", ", ".join(map(str, waiting)))
            return
        settled = streams.settled()
        if await self._state.write_streams(settled, streams.generation):
            gone = sorted(set(streams.streams) - set(settled.streams))
            self._journal.platform("session-streams-replaced", f"{', '.join(gone)} is no longer used")
            for stream in gone:
                try:
                    await self._bus.api(f"STREAM.DELETE.{stream}", {}, timeout=2.0)
                except BusError as error:
                    log.info("the stream %s, no longer used, is left behind: %s", stream, error)
