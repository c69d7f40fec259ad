"""One ring on this node: watches its keys, plans, takes partitions and gives them back.

It decides nothing: :mod:`phalanx.decide.ring_plan` and :mod:`phalanx.decide.ring_ownership` do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Protocol

import msgspec

from phalanx import system
from phalanx.aio import Background, wait_at_most
from phalanx.coord.complaints import Complaints
from phalanx.coord.noted_sessions import Judges, NotedSessions
from phalanx.coord.owned_keys import OwnedKeys, holder_in
from phalanx.coord.watch import Watch
from phalanx.decide.ring_ownership import Begin, End, Ownership, Read, Write
from phalanx.decide.ring_plan import SETTLE_SECONDS, Planner, Propose, RingMember, RingPlan, Wait, wanted
from phalanx.decide.timing import Timing
from phalanx.errors import BusError, ConfigError, WrongRevision
from phalanx.names import RING_KEYS, RING_PLAN_KEY, Names
from phalanx.ports import Bus, Connection, Fence, Record
from phalanx.types import SessionId

log = logging.getLogger("phalanx.ring")

REQUEST_TIMEOUT_SECONDS = 2.0
RETRY_SECONDS = 0.1

_member_of = msgspec.json.Decoder(RingMember).decode
_plan_of = msgspec.json.Decoder(RingPlan).decode
_encode = msgspec.json.Encoder().encode


class RingSession(Protocol):
    """What a ring needs of the node's session (:class:`phalanx.coord.session.Session`)."""

    @property
    def id(self) -> SessionId: ...
    @property
    def timing(self) -> Timing: ...
    @property
    def valid_until(self) -> float: ...
    @property
    def is_valid(self) -> bool: ...
    @property
    def may_begin(self) -> bool: ...
    @property
    def is_taken_up(self) -> bool: ...
    def on_change(self, callback: Callable[[], None]) -> None: ...
    def off_change(self, callback: Callable[[], None]) -> None: ...


class RingPartitions:
    """The partitions of one app's ring, for one session of this node.

    *on_begin* is told of each partition that this node owns from now on, with the fence for its writes;
    *on_end* of each that it has to cease to own: why, and whether that has to be at once. Call
    :meth:`ended` when nothing of it runs any more. Neither may block. *on_change* is told that what is shown
    here may have changed. While *paused* the plan stays as it is, so that nothing changes hands.
    """

    def __init__(
        self,
        bus: Bus,
        names: Names,
        app: str,
        session: RingSession,
        register: Judges,
        partitions: int,
        *,
        on_begin: Callable[[int, Fence], None],
        on_end: Callable[[int, str, bool], None],
        on_change: Callable[[], None] = lambda: None,
        paused: Callable[[], bool] = lambda: False,
        fences: bool = False,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self._on_change, self._paused, self._fences = on_change, paused, fences
        self._bus, self._names, self._app = bus, names, app
        self._session, self._register, self._count = session, register, partitions
        self._on_begin, self._on_end = on_begin, on_end
        self._bucket = names.app_bucket(app)
        self._stream = names.bucket_stream(self._bucket)
        self._own = Ownership(session.id, partitions, register.is_over, taken_up=session.is_taken_up)
        self._planner = Planner(session.id.node, partitions, settle_seconds=settle_seconds)
        self.members: dict[str, RingMember] = {}
        """The offers of all nodes, also of those that are gone."""
        self._offer = RingMember(session.id, 1, False, "starting", fences)
        self._offered: RingMember | None = None
        self._offer_revision = 0
        self._offering = self._proposing = False
        self._noted = NotedSessions(register)
        self._refused: ConfigError | None = None
        self._complaints = Complaints(log, app)
        self._background = Background(log)
        self._changed = asyncio.Event()
        self._clear = asyncio.Event()
        self._leaving = False
        self._watch = Watch(
            bus,
            self._stream,
            f"{names.key_subject(self._bucket, RING_KEYS)}.>",
            watch_prefix=f"{names.watch_prefix(app)}.{RING_KEYS}",
            on_record=self._on_record,
        )
        self._keys = OwnedKeys(
            bus,
            app,
            self._own,
            self._stream,
            self._complaints,
            subject=self._subject,
            forget=self._watch.forget,
            on_answer=self._changed.set,
        )

    # --- for the app

    @property
    def plan(self) -> RingPlan | None:
        """Who shall own what; None before there is a plan."""
        return self._planner.plan

    @property
    def held(self) -> list[int]:
        """The partitions that this node owns, or is ceasing to own."""
        return self._own.held

    def epoch(self, partition: int) -> int:
        """The epoch under which this node owns *partition*; 0 if it does not."""
        return self._own.epoch(partition) if self._session.is_valid else 0

    def planned_owner(self, partition: int) -> str | None:
        """The node that shall own *partition*; None: nobody, as far as is known here."""
        return self._own.planned(partition)

    def owner(self, partition: int) -> tuple[int, SessionId | None]:
        """What the key of *partition* says, as far as is known here: its epoch, and whose it is."""
        return self._own.holder(partition)

    def offer(self, *, ready: bool, weight: int = 1, reason: str = "") -> None:
        """Whether this node may be planned in, and with which weight; *reason*: why not."""
        able = ready and not self._leaving
        self._offer = RingMember(self._session.id, weight, able, reason, self._fences)
        self._changed.set()

    def set_aside(self, partition: int, aside: bool) -> None:
        """Leave *partition* alone for a while: it has failed here."""
        self._own.set_aside(partition, aside)
        self._changed.set()

    def ended(self, partition: int) -> None:
        """Nothing of *partition* runs here any more."""
        self._own.on_ended(partition)
        self._changed.set()

    def bar(self, reason: str) -> None:
        """Give everything back and take nothing any more, as *reason* says. Empty: take part again."""
        self._leaving = bool(reason)
        self._clear.clear()
        self.offer(ready=not reason, weight=self._offer.weight, reason=reason)
        self._own.leave(self._leaving)

    def holders(self) -> Collection[SessionId]:
        """The sessions that are named by the key of any partition."""
        return self._own.holders()

    @property
    def is_clear(self) -> bool:
        """Whether this session holds no key any more, as far as is known."""
        return self._own.is_clear

    async def leave(self, timeout: float) -> bool:
        """Give everything back and take nothing any more; whether that was done within *timeout* seconds."""
        self.bar("the node is stopping")
        return await wait_at_most(self._clear, timeout)

    # --- the loop

    async def run(self) -> None:
        """Watch and act until cancelled. Raises ConfigError if the ring has another number of partitions."""
        stop_listening = self._bus.on_connection(self._on_connection)
        self._register.on_over(self._on_session_over)
        self._session.on_change(self._changed.set)
        try:
            await self._watch.start()
            while self._refused is None:
                self._changed.clear()
                wait = self._step()
                await wait_at_most(self._changed, None if wait is None else max(0.001, wait))
            raise self._refused
        finally:
            stop_listening()
            self._register.off_over(self._on_session_over)
            self._session.off_change(self._changed.set)
            self._noted.are(set())
            await self._keys.close()
            await self._background.close()
            await self._watch.close()

    def _step(self) -> float | None:
        """Do what is due; after how many seconds to look again (None: when something changes)."""
        session, now = self._session, system.now()
        valid, may_begin = session.is_valid, session.may_begin
        for action in self._own.step(valid=valid, may_begin=may_begin):
            match action:
                case Begin(partition, epoch):
                    self._on_begin(partition, Fence(self._subject(partition), epoch))
                case End(partition, _, reason, hard):
                    self._on_end(partition, reason, hard)
                case Write() | Read():
                    self._keys.carry_out(action)
        self._noted.are({*self._own.holders(), *(member.session for member in self.members.values())})
        moments: list[float] = []
        if valid:
            ends = session.valid_until
            moments.append(session.timing.stand_down_at(ends) if may_begin else ends)
            self._tell_offer()
            if (look_at := self._plan(now)) is not None:
                moments.append(look_at)
        if self._leaving and self._own.is_clear:
            self._clear.set()
        self._on_change()
        return min(moments) - now if moments else None

    def _subject(self, partition: int) -> str:
        return self._names.key_subject(self._bucket, self._names.partition_key(partition))

    # --- membership and plan

    async def _unanswered(self, what: str, error: BusError) -> None:
        """It is tried again a moment later."""
        self._complaints.tell(what, error)
        await asyncio.sleep(RETRY_SECONDS)

    def _tell_offer(self) -> None:
        if self._offer != self._offered and not self._offering:
            # Until it is answered nobody knows what is stored.
            self._offering, self._offered = True, None
            self._background.spawn(self._publish_offer(self._offer), f"ring {self._app} offer")

    async def _publish_offer(self, offer: RingMember) -> None:
        key = self._names.ring_member_key(self._session.id.node)
        subject = self._names.key_subject(self._bucket, key)
        try:
            revision = await self._bus.write(subject, _encode(offer), timeout=REQUEST_TIMEOUT_SECONDS)
        except BusError as error:
            await self._unanswered("the offer to own partitions", error)
        else:
            # Unless something that was sent earlier has been stored since.
            self._offered = offer if revision >= self._offer_revision else None
        finally:
            self._offering = False
            self._changed.set()

    def _plan(self, now: float) -> float | None:
        """Do what is due about the plan; the moment to look again."""
        self._planner.on_members(wanted(self.members, self._register.is_over), now)
        action = None if self._proposing or self._paused() else self._planner.next_action(now)
        if isinstance(action, Propose):
            self._proposing = True
            self._background.spawn(self._propose(action), f"ring {self._app} plan")
        return action.until if isinstance(action, Wait) else None

    async def _propose(self, action: Propose) -> None:
        subject = self._names.key_subject(self._bucket, RING_PLAN_KEY)
        try:
            try:
                revision = await self._bus.write(
                    subject,
                    _encode(action.plan),
                    expect=action.expected_revision,
                    timeout=REQUEST_TIMEOUT_SECONDS,
                )
            except WrongRevision:
                # Another node was faster; or it was our own, or a spurious refusal: read back.
                record = await self._bus.read(self._stream, subject, timeout=REQUEST_TIMEOUT_SECONDS)
                if record is not None:
                    self._learn_plan(record.revision, None if record.removed else _plan_of(record.data))
            else:
                self._learn_plan(revision, action.plan)
        except BusError as error:
            await self._unanswered("the plan of the ring", error)
        finally:
            self._proposing = False
            self._changed.set()

    def _learn_plan(self, revision: int, plan: RingPlan | None) -> None:
        if plan is not None and len(plan.owners) != self._count:
            self._refused = other_partitions(self._app, self._count, len(plan.owners))
        elif revision > self._planner.revision:
            self._planner.on_plan(revision, plan, system.now())
            self._own.on_plan(plan.owner_names() if plan is not None else (None,) * self._count)

    # --- what was seen

    def _on_connection(self, event: Connection) -> None:
        if event is Connection.CONNECTED:
            self._own.on_reconnected()
            self._changed.set()

    def _on_session_over(self, session: SessionId) -> None:
        self._own.on_session_over(session)
        self._changed.set()

    def _on_record(self, record: Record) -> None:
        key = record.subject.removeprefix(self._names.key_subject(self._bucket, f"{RING_KEYS}."))
        kind, _, rest = key.partition(".")
        if kind == "plan":
            self._learn_plan(record.revision, None if record.removed else _plan_of(record.data))
        elif kind == "member":
            self._on_member(rest, record)
        elif kind == "part" and rest.isdecimal() and int(rest) < self._count:
            self._own.on_record(int(rest), record.revision, holder_in(record))
        self._changed.set()

    def _on_member(self, node: str, record: Record) -> None:
        if record.removed:
            self.members.pop(node, None)
        else:
            self.members[node] = _member_of(record.data)
        if node == self._session.id.node:
            self._offer_revision = max(self._offer_revision, record.revision)
            if self.members.get(node) != self._offer:
                # What was sent long ago, or by an earlier life, may have arrived after all: say it again.
                self._offered = None


def other_partitions(app: str, declared: int, found: int) -> ConfigError:
    """What is wrong if the ring of *app* has *found* partitions."""
    return ConfigError(
        f"apps.{app}.pattern.partitions",
        declared,
        f"the ring of app {app} has {found} partitions",
        "a ring keeps its number of partitions, as data lies by it: declare that one, or a new app",
    )
