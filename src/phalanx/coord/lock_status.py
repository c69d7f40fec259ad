"""Who holds locks and semaphores and who waits for them, for people and programs that look.

All of it is in their keys. Nothing is decided by it here.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from phalanx.coord.lock_body import Kind, decode_state
from phalanx.coord.lock_claim import Parts
from phalanx.decide.lock import Entry, LockState, without_over
from phalanx.names import LEADER_KEY
from phalanx.ports import Record


class LockHolder(msgspec.Struct, frozen=True):
    """Who holds it: *session* of *node*, under *epoch* (0: not by a leader), with *token*, since *time* (Unix
    seconds by the holder's clock when it asked for it, for people)."""

    node: str
    session: str
    epoch: int
    token: int
    time: float


class LockWaiter(msgspec.Struct, frozen=True):
    """A node on which *tasks* tasks wait, the first of them since about *time* (Unix seconds, for people)."""

    node: str
    tasks: int
    time: float


class LockStatus(msgspec.Struct, frozen=True):
    """A lock, or a semaphore, that is held. *waiters*: in the order of the first task of each node."""

    name: str
    holders: tuple[LockHolder, ...]
    waiters: tuple[LockWaiter, ...] = ()
    kind: str = "lock"
    permits: int = 1

    @property
    def node(self) -> str:
        """The node of its first holder."""
        return self.holders[0].node

    @property
    def session(self) -> str:
        """The session of its first holder."""
        return self.holders[0].session

    @property
    def epoch(self) -> int:
        """The epoch of its first holder."""
        return self.holders[0].epoch

    @property
    def token(self) -> int:
        """The token of its first holder."""
        return self.holders[0].token

    @property
    def time(self) -> float:
        """Since when its first holder wants it."""
        return self.holders[0].time


async def status_of(parts: Parts, kind: Kind, name: str) -> LockStatus | None:
    """Who holds it, by the word of the stream's leader. Raises BusError."""
    record = await parts.bus.read(parts.stream, parts.subject(parts.names.lock_key(kind, name)))
    if record is None:
        return None
    found = await _statuses(parts, kind, [record])
    return found[0] if found else None


async def all_statuses(parts: Parts) -> list[LockStatus]:
    """All that are held, by name. Any replica answers. Raises BusError."""
    found: list[LockStatus] = []
    for kind in Kind:
        found += await _statuses(
            parts,
            kind,
            await parts.bus.snapshot(parts.stream, parts.subject(parts.names.lock_key(kind, ">"))),
        )
    return sorted(found, key=lambda each: (each.name, each.kind))


async def _statuses(parts: Parts, kind: Kind, records: list[Record]) -> list[LockStatus]:
    states = {
        record.subject.removeprefix(parts.subject(parts.names.lock_key(kind, ""))): decode_state(kind, record)
        for record in records
    }
    epoch = 0
    if any(each.epoch for state in states.values() for each in (*state.holders, *state.queue)):
        leader = await parts.bus.read(parts.stream, parts.subject(LEADER_KEY))
        epoch = leader.revision if leader else 0

    def is_over(entry: Entry) -> bool:
        if 0 < entry.epoch < epoch:
            return True
        if entry.session == parts.session.id:
            return False
        parts.register.note(entry.session)
        try:
            return parts.register.is_over(entry.session)
        finally:
            parts.register.unnote(entry.session)

    return [status for name, state in states.items() if (status := shown(kind, name, state, is_over))]


def shown(kind: Kind, name: str, state: LockState, is_over: Callable[[Entry], bool]) -> LockStatus | None:
    """What there is to see; None where nobody holds it."""
    left = without_over(state, is_over)
    if not left.holders:
        return None
    waiting: dict[str, list[Entry]] = {}
    for entry in left.queue:
        waiting.setdefault(entry.session.node, []).append(entry)
    return LockStatus(
        name,
        tuple(
            LockHolder(each.session.node, str(each.session), each.epoch, each.token, each.since)
            for each in left.holders
        ),
        tuple(
            LockWaiter(node, len(entries), min(each.since for each in entries))
            for node, entries in waiting.items()
        ),
        str(kind),
        left.permits,
    )


__all__ = ["LockHolder", "LockStatus", "LockWaiter", "all_statuses", "shown", "status_of"]
