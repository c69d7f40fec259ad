"""What the platform's bucket and its session streams say, read from outside of its nodes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from phalanx.decide.session import SessionBody, StreamList
from phalanx.errors import BusError
from phalanx.names import SWITCHOVER_KEYS, Names
from phalanx.ports import Bus, Message, Record
from phalanx.types import Member, Pause, PlannedSwitchover

T = TypeVar("T")


class PlatformBucket(msgspec.Struct, frozen=True):
    """What the platform's bucket says."""

    members: dict[str, Member]
    apps: tuple[str, ...]
    databases: tuple[str, ...]
    streams: StreamList | None
    member_revisions: dict[str, int]
    pauses: dict[str, Pause]
    switchovers: dict[str, PlannedSwitchover]

    @classmethod
    def of(cls, records: Mapping[str, Record]) -> PlatformBucket:
        """What *records*, by key, say."""
        held = {key: record for key, record in records.items() if not record.removed}
        streams = held.get(Names.SESSIONS_KEY)
        return cls(
            {
                key.removeprefix("member."): member
                for key, record in held.items()
                if key.startswith("member.") and (member := decoded(record, Member)) is not None
            },
            tuple(sorted(key.removeprefix("app.") for key in held if key.startswith("app."))),
            tuple(sorted(key.removeprefix("database.") for key in held if key.startswith("database."))),
            decoded(streams, StreamList) if streams is not None else None,
            {
                key.removeprefix("member."): record.revision
                for key, record in held.items()
                if key.startswith("member.")
            },
            {
                key.removeprefix(Names.PAUSE_KEY).removeprefix("."): pause
                for key, record in held.items()
                if (key == Names.PAUSE_KEY or key.startswith(f"{Names.PAUSE_KEY}."))
                and (pause := decoded(record, Pause)) is not None
            },
            {
                planned.app: planned
                for key, record in held.items()
                if key.startswith(f"{SWITCHOVER_KEYS}.")
                and (planned := decoded(record, PlannedSwitchover)) is not None
            },
        )


def decoded(message: Message | Record, kind: type[T]) -> T | None:
    """What a node of this or a later version wrote; None for what is not understood."""
    try:
        return msgspec.json.decode(message.data, type=kind)
    except msgspec.MsgspecError:
        return None


async def live_members(bus: Bus, names: Names, state: PlatformBucket) -> set[str]:
    """Members whose session a majority of session streams neither ends nor lacks."""
    streams = state.streams
    if streams is None:
        return set(state.members)
    is_over = await ended_sessions(bus, names, streams)
    return {node for node, member in state.members.items() if not is_over(str(member.session))}


async def ended_sessions(bus: Bus, names: Names, streams: StreamList | None) -> Callable[[str], bool]:
    """Tells of a session whether a majority of session streams ends or lacks it."""
    if streams is None:
        return lambda session: False
    bodies = await asyncio.gather(*(_sessions(bus, names, stream) for stream in streams.all_streams))
    by_stream = dict(zip(streams.all_streams, bodies, strict=True))

    def is_over(session: str) -> bool:
        gone = [s for s, held in by_stream.items() if held is not None and session not in held]
        return streams.has_majority(gone)

    return is_over


async def _sessions(bus: Bus, names: Names, stream: str) -> set[str] | None:
    """The sessions that *stream* holds and that have no tombstone there; None if it can't be read."""
    try:
        records = await bus.snapshot(stream, names.session_subjects(stream))
    except BusError:
        return None
    held: set[str] = set()
    for record in records:
        with contextlib.suppress(msgspec.MsgspecError):
            if not record.removed and not msgspec.json.decode(record.data, type=SessionBody).tombstone:
                held.add(str(names.session_of(record.subject)))
    return held


__all__ = ["PlatformBucket", "decoded", "ended_sessions", "live_members"]
