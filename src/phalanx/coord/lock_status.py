"""Who holds an app's locks and who waits for them, for people and programs that look.

Holders are in the locks' own keys. A node whose tasks wait for a lock longer than a second says so in
``waiter.<lock>.<node>``, one key for each node and lock, which vanishes when nobody there waits any more and,
should the node die, with its TTL. Nothing is decided by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec

from phalanx.aio import Background
from phalanx.coord.lock_key import Parts, decode_holder
from phalanx.errors import BusError
from phalanx.names import LEADER_KEY
from phalanx.ports import Record
from phalanx.types import SessionId

log = logging.getLogger("phalanx.locks")

SHOWN_AFTER_SECONDS = 1.0
"""Who waits shorter is not worth two writes."""

WAITER_TTL_SECONDS = 60
REFRESH_SECONDS = 20.0

_ROLLUP = {"Nats-Rollup": "sub"}
_GONE = {"KV-Operation": "PURGE", "Nats-Rollup": "sub"}


class LockWaiter(msgspec.Struct, frozen=True):
    """A node on which *tasks* tasks wait for a lock, since about *time* (Unix seconds, for people)."""

    node: str
    tasks: int
    time: float


class LockStatus(msgspec.Struct, frozen=True):
    """A lock that is held: by *session* of *node*, under *epoch* (0: not by a leader), with *token*, since
    *time* (Unix seconds by the server's clock, for people); *waiters*: the nodes that want it."""

    name: str
    node: str
    session: str
    epoch: int
    token: int
    time: float
    waiters: tuple[LockWaiter, ...] = ()


class _Waiter(msgspec.Struct, frozen=True):
    """What a waiter's key holds."""

    session: SessionId
    tasks: int


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Waiter).decode


class Waiting:
    """The tasks of this node that wait for the lock *name*; shown in NATS while there are any for long."""

    def __init__(self, parts: Parts, name: str, settling: Background) -> None:
        self._parts, self._settling = parts, settling
        self._subject = parts.subject(f"waiter.{name}.{parts.session.id.node}")
        self._tasks = 0
        self._timer: asyncio.TimerHandle | None = None
        self._showing: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._tasks += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SHOWN_AFTER_SECONDS, self._begin)

    def __exit__(self, *_: object) -> None:
        self._tasks -= 1
        if self._tasks:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._showing is not None:
            self._showing.cancel()
            self._settling.spawn(self._hide(self._showing), f"hide {self._subject}")
            self._showing = None

    def _begin(self) -> None:
        self._showing = asyncio.create_task(self._show(), name=f"show {self._subject}")

    async def _show(self) -> None:
        while True:
            data = _encode(_Waiter(self._parts.session.id, self._tasks))
            with contextlib.suppress(BusError):
                await self._parts.bus.write(
                    self._subject, data, headers=_ROLLUP, ttl_seconds=WAITER_TTL_SECONDS
                )
            await asyncio.sleep(REFRESH_SECONDS)

    async def _hide(self, showing: asyncio.Task[None]) -> None:
        await asyncio.gather(showing, return_exceptions=True)
        with contextlib.suppress(BusError):  # then it goes with its time
            await self._parts.bus.write(self._subject, b"", headers=_GONE, ttl_seconds=1)


async def status_of(parts: Parts, name: str) -> LockStatus | None:
    """Who holds the lock *name*, by the word of the stream's leader. Raises BusError."""
    record = await parts.bus.read(parts.stream, parts.subject(f"lock.{name}"))
    if record is None:
        return None
    waiters = await parts.bus.snapshot(parts.stream, parts.subject(f"waiter.{name}.*"))
    return _status(parts, record, waiters, await _epoch(parts, [record]))


async def all_statuses(parts: Parts) -> list[LockStatus]:
    """All locks that are held, by name. Any replica answers. Raises BusError."""
    records = await parts.bus.snapshot(parts.stream, parts.subject("lock.>"))
    waiters = await parts.bus.snapshot(parts.stream, parts.subject("waiter.>"))
    of: dict[str, list[Record]] = {}
    for waiter in waiters:
        of.setdefault(_lock_of(parts, waiter), []).append(waiter)
    epoch = await _epoch(parts, records)
    found = [
        _status(parts, record, of.get(record.subject.removeprefix(parts.subject("lock.")), []), epoch)
        for record in records
    ]
    return sorted((each for each in found if each is not None), key=lambda each: each.name)


async def _epoch(parts: Parts, records: list[Record]) -> int:
    """The present epoch; 0 where no lock is held under one."""
    if not any(decode_holder(record).epoch for record in records):
        return 0
    leader = await parts.bus.read(parts.stream, parts.subject(LEADER_KEY))
    return leader.revision if leader else 0


def _status(parts: Parts, record: Record, waiters: list[Record], epoch: int) -> LockStatus | None:
    holder = decode_holder(record)
    session = holder.session
    if session is None or 0 < holder.epoch < epoch:
        return None
    if session != parts.session.id:
        parts.register.note(session)
        if parts.register.is_over(session):
            return None
    return LockStatus(
        record.subject.removeprefix(parts.subject("lock.")),
        session.node,
        str(session),
        holder.epoch,
        record.revision,
        record.time,
        tuple(seen for waiter in waiters if (seen := _waiter(parts, waiter)) is not None),
    )


def _waiter(parts: Parts, record: Record) -> LockWaiter | None:
    if record.removed:
        return None
    try:
        waiter = _decode(record.data)
    except msgspec.DecodeError as error:
        log.error("%s tells of no waiter (%s)", record.subject, error)
        return None
    if parts.register.is_over(waiter.session):
        return None
    return LockWaiter(waiter.session.node, waiter.tasks, record.time)


def _lock_of(parts: Parts, waiter: Record) -> str:
    return waiter.subject.removeprefix(parts.subject("waiter.")).rpartition(".")[0]
