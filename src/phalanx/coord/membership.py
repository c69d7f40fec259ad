"""The platform's shared state: its identity, its members, its apps, its list of session streams."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import TypeVar

import msgspec

from phalanx import system
from phalanx.coord.register import Register
from phalanx.coord.watch import Watch
from phalanx.decide.session import StreamList
from phalanx.errors import BusError, IdentityError, NodeIdTaken, WrongRevision
from phalanx.names import SWITCHOVER_KEYS, Names
from phalanx.ports import Bus, Record
from phalanx.types import FenceNote, Member, Pause, PlannedSwitchover

log = logging.getLogger("phalanx.membership")

T = TypeVar("T")

NONCE_HEADER = "Phalanx-Nonce"
"""By which a node tells its own removal of a planned switchover from another's."""

CREATE_TRIES = 50
CREATE_RETRY_SECONDS = 0.1

_encode = msgspec.json.Encoder().encode


class Identity(msgspec.Struct, frozen=True):
    """Made once with the platform's bucket; every node remembers the id it has joined."""

    id: str
    created: float

    @classmethod
    def new(cls) -> Identity:
        """A fresh identity."""
        return cls(secrets.token_hex(16), system.wall())


class AppRegistration(msgspec.Struct, frozen=True):
    """That an app was created once: from then on its bucket must exist."""

    created: float
    by: str


class PlatformState:
    """A watched copy of the platform's bucket, and the compare-and-sets on it."""

    def __init__(self, bus: Bus, names: Names) -> None:
        self._bus, self._names = bus, names
        self._stream = names.bucket_stream(names.platform_bucket)
        self._nonce = secrets.token_hex(8)
        self.members: dict[str, Member] = {}
        self.apps: dict[str, AppRegistration] = {}
        self.switchovers: dict[str, tuple[PlannedSwitchover, int]] = {}
        """What is planned, by app, and the revision of each."""
        self.streams: StreamList | None = None
        self.pauses: dict[str, Pause] = {}
        """By app; that of the whole platform by :data:`phalanx.decide.pause.WHOLE_PLATFORM`. While NATS is
        away they are what they were."""
        self._on_pauses: list[Callable[[], None]] = []
        self._on_switchovers: list[Callable[[], None]] = []
        self.fenced: dict[str, FenceNote] = {}
        """By node: which of its sessions was said to run nothing any more, of any app."""
        self._on_fenced: list[Callable[[], None]] = []
        self._on_streams: list[Callable[[StreamList], None]] = []
        self._watch = Watch(
            bus,
            self._stream,
            f"{names.key_subject(names.platform_bucket, '>')}",
            watch_prefix=names.watch_prefix(None),
            on_record=self._on_record,
        )

    async def start(self) -> None:
        """Begin to watch."""
        await self._watch.start()

    async def close(self) -> None:
        """No longer watch."""
        await self._watch.close()

    def on_streams(self, callback: Callable[[StreamList], None]) -> None:
        """Be told when the list of session streams changes."""
        self._on_streams.append(callback)

    def on_fenced(self, callback: Callable[[], None]) -> None:
        """Be told when a node was said to be off."""
        self._on_fenced.append(callback)

    def off_fenced(self, callback: Callable[[], None]) -> None:
        """No longer be told."""
        self._on_fenced.remove(callback)

    def on_pauses(self, callback: Callable[[], None]) -> None:
        """Be told when something was paused or resumed."""
        self._on_pauses.append(callback)

    def on_switchovers(self, callback: Callable[[], None]) -> None:
        """Be told when a planned hand-over comes or goes."""
        self._on_switchovers.append(callback)

    async def take_switchover(self, app: str, revision: int) -> bool:
        """Remove a planned hand-over, to carry it out: False if it was called off or is somebody else's.

        Raises BusError; then ask again, also when it has vanished meanwhile: that may have been this node.
        """
        subject = self._subject(self._names.switchover_key(app))
        headers = {"KV-Operation": "DEL", NONCE_HEADER: self._nonce}
        try:
            await self._bus.write(subject, expect=revision, headers=headers)
        except WrongRevision:
            # Perhaps by our own attempt, whose answer was lost; and a refusal alone proves nothing.
            found = await self._bus.read(self._stream, subject)
            if found is not None and found.revision == revision:
                raise
            return found is not None and found.removed and found.headers.get(NONCE_HEADER) == self._nonce
        return True

    def _subject(self, key: str) -> str:
        return self._names.key_subject(self._names.platform_bucket, key)

    async def read(self, key: str, kind: type[T]) -> tuple[T, int] | None:
        """A key's value and revision, from the stream's leader."""
        record = await self._bus.read(self._stream, self._subject(key))
        if record is None or record.removed:
            return None
        return msgspec.json.decode(record.data, type=kind), record.revision

    async def create_or_read(self, key: str, value: T) -> T:
        """Create *key* with *value*, or return what somebody else has created before."""
        kind = type(value)
        for _ in range(CREATE_TRIES):
            if (found := await self.read(key, kind)) is not None:
                return found[0]
            try:
                await self._bus.write(self._subject(key), _encode(value), expect=0)
            except WrongRevision:
                # Somebody else's creation may be refused to us before it can be read (10164).
                await asyncio.sleep(CREATE_RETRY_SECONDS)
            else:
                return value
        raise IdentityError(
            f"key {key!r} of bucket {self._names.platform_bucket!r} can be neither created nor read",
            "nobody but Phalanx should write there; see docs/operations.md",
        )

    async def take_setup_lock(self, node: str, seconds: float) -> bool:
        """Become the one node that makes the platform's session streams. Lapses after *seconds*."""
        try:
            await self._bus.write(
                self._subject(self._names.SETUP_KEY), node.encode(), expect=0, ttl_seconds=seconds
            )
        except WrongRevision:
            record = await self._bus.read(self._stream, self._subject(self._names.SETUP_KEY))
            if record is None or not (record.removed or record.data == node.encode()):
                return False
            try:
                await self._bus.write(
                    self._subject(self._names.SETUP_KEY),
                    node.encode(),
                    expect=record.revision,
                    ttl_seconds=seconds,
                )
            except WrongRevision:
                return False
        return True

    async def claim_member(self, member: Member, register: Register, wait_seconds: float) -> None:
        """Take the node id for this session. Raises NodeIdTaken while another live session has it."""
        subject = self._subject(self._names.member_key(member.node))
        deadline = system.now() + wait_seconds
        while True:
            found = await self.read(self._names.member_key(member.node), Member)
            revision = 0
            if found is not None:
                holder, revision = found
                if holder == member:
                    return
                # Else it is our own, of this life or of one whose session we have taken up.
                if holder.session != member.session:
                    await self._wait_over(holder, register, deadline)
            elif (record := await self._bus.read(self._stream, subject)) is not None:
                revision = record.revision
            try:
                await self._bus.write(subject, _encode(member), expect=revision)
            except WrongRevision:
                continue  # another one was faster, or our own reply was lost: look again
            return

    async def _wait_over(self, holder: Member, register: Register, deadline: float) -> None:
        register.note(holder.session)
        try:
            is_over = await register.wait_over(holder.session, deadline - system.now())
        finally:
            register.unnote(holder.session)
        if not is_over:
            raise NodeIdTaken(holder.node, str(holder.session), holder.host)

    async def remove_member(self, node: str, member: Member) -> None:
        """Take this node off the list after a graceful end. Best effort: a dead one stays listed as dead."""
        try:
            found = await self.read(self._names.member_key(node), Member)
            if found is not None and found[0].session == member.session:
                await self._bus.write(
                    self._subject(self._names.member_key(node)),
                    b"",
                    expect=found[1],
                    headers={"KV-Operation": "DEL"},
                )
        except BusError as error:
            log.warning("leaving the member list: %s", error)

    async def write_streams(self, streams: StreamList, expect_generation: int) -> bool:
        """Replace the list of session streams if it is at *expect_generation*. False if it is not."""
        found = await self.read(self._names.SESSIONS_KEY, StreamList)
        if found is None or found[0].generation != expect_generation:
            return False
        try:
            await self._bus.write(self._subject(self._names.SESSIONS_KEY), _encode(streams), expect=found[1])
        except WrongRevision:
            return False
        return True

    def _on_record(self, record: Record) -> None:
        key = record.subject.removeprefix(self._subject(""))
        if key == self._names.SESSIONS_KEY and not record.removed:
            streams = msgspec.json.decode(record.data, type=StreamList)
            if self.streams is None or streams.generation > self.streams.generation:
                self.streams = streams
                for callback in self._on_streams:
                    callback(streams)
        elif key.startswith("member."):
            node = key.removeprefix("member.")
            if record.removed:
                self.members.pop(node, None)
            else:
                self.members[node] = msgspec.json.decode(record.data, type=Member)
        elif key.startswith(f"{SWITCHOVER_KEYS}."):
            self._learn_switchover(key.removeprefix(f"{SWITCHOVER_KEYS}."), record)
        elif key == Names.PAUSE_KEY or key.startswith(f"{Names.PAUSE_KEY}."):
            self._on_pause(key.removeprefix(Names.PAUSE_KEY).removeprefix("."), record)
        elif key.startswith("fenced.") and key.count(".") == 1 and not record.removed:
            self.fenced[key.removeprefix("fenced.")] = msgspec.json.decode(record.data, type=FenceNote)
            for callback in list(self._on_fenced):
                callback()
        elif key.startswith("app.") and not record.removed:
            self.apps[key.removeprefix("app.")] = msgspec.json.decode(record.data, type=AppRegistration)

    def _on_pause(self, app: str, record: Record) -> None:
        before = self.pauses.pop(app, None)
        if not record.removed:
            self.pauses[app] = msgspec.json.decode(record.data, type=Pause)
        if self.pauses.get(app) != before:
            for callback in self._on_pauses:
                callback()

    def _learn_switchover(self, app: str, record: Record) -> None:
        if record.removed:
            self.switchovers.pop(app, None)
        else:
            planned = msgspec.json.decode(record.data, type=PlannedSwitchover)
            self.switchovers[app] = planned, record.revision
        for callback in self._on_switchovers:
            callback()
