"""The seats of one pool on this node: watches them, takes one, gives it back.

It decides nothing: :mod:`phalanx.decide.pool` says which seat, :mod:`phalanx.decide.ring_ownership` how it is
owned. To its app it is what an election is to an active-passive one: ``phalanx.app.contest.Contest``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from phalanx import system
from phalanx.aio import Background, wait_at_most
from phalanx.coord.complaints import Complaints
from phalanx.coord.election import Reign
from phalanx.coord.noted_sessions import Judges, NotedSessions
from phalanx.coord.owned_keys import OwnedKeys, holder_in
from phalanx.coord.ring import RingSession
from phalanx.coord.watch import Watch
from phalanx.decide.election import begins_anew
from phalanx.decide.pool import MAX_SEATS, Leave, PoolScale, SeatView, Take, Wait, next_seat, ranked
from phalanx.decide.ring_ownership import Begin, End, Ownership, Read, Write
from phalanx.errors import BusError, ConfigError, WrongRevision
from phalanx.names import POOL_KEYS, POOL_SCALE_KEY, Names
from phalanx.ports import Bus, Connection, Fence, Record
from phalanx.types import Candidate, Epoch, SessionId, Succession

log = logging.getLogger("phalanx.pool")

RETRY_SECONDS = 0.1
REQUEST_TIMEOUT_SECONDS = 2.0
RELEASE_SECONDS = 1.0
"""How long a release is waited for; if NATS does not answer it is tried again until the session ends."""

_candidate_of = msgspec.json.Decoder(Candidate).decode
_scale_of = msgspec.json.Decoder(PoolScale).decode
_encode = msgspec.json.Encoder().encode


class Seats:
    """The seats of one app. One reign at a time: ``next_reign()``, work, ``release(reign)``.

    *replicas*: how many the node declares, None: all. *highest*: the highest epoch that this node has seen in
    earlier terms; *adopted*: that of what an earlier life of it has left running (0: nothing). *on_change*:
    told of whatever a status shows; *on_acquired* of each seat that this node has taken, and how that came.
    """

    def __init__(
        self,
        bus: Bus,
        names: Names,
        app: str,
        session: RingSession,
        register: Judges,
        *,
        replicas: int | None,
        highest: int = 0,
        adopted: int = 0,
        paused: Callable[[], bool] = lambda: False,
        on_change: Callable[[], None] = lambda: None,
        why_over: Callable[[SessionId], str] = lambda session: "",
        on_acquired: Callable[[int, Succession], None] = lambda seat, succession: None,
    ) -> None:
        self._bus, self._names, self._app = bus, names, app
        self._session, self._register = session, register
        self._declared, self._highest, self._adopted = replicas, highest, adopted
        self._paused, self._on_change, self._on_acquired = paused, on_change, on_acquired
        self._why_over = why_over
        self._bucket = names.app_bucket(app)
        self._own = Ownership(session.id, MAX_SEATS, register.is_over)
        self._seen: set[int] = set()
        """The seats that were ever taken, as far as is known."""
        self._inherited: set[int] = set()
        """Epochs that an earlier life of this node has left to this session."""
        self.scale: PoolScale | None = None
        """An operator's word; None: what is declared counts."""
        self.candidates: dict[str, Candidate] = {}
        self._eligible, self._not_before = False, float("-inf")
        self._reason = ""
        self._told: Candidate | None = None
        self._telling = False
        self._target: int | None = None
        self._releasing: set[int] = set()
        """Seats whose keys name this session for nothing any more."""
        self._reign: Reign | None = None
        self._reigns: asyncio.Queue[Reign] = asyncio.Queue(1)
        self._before: dict[int, tuple[int, SessionId | None]] = {}
        """Who had each seat before it was taken the last time: epoch and session."""
        self._kept = False
        self._joined_at = self._free_since = float("inf")
        self._noted = NotedSessions(register)
        self._changed = asyncio.Event()
        self._released = asyncio.Event()
        self._complaints = Complaints(log, app)
        self._background = Background(log)
        self._watch = Watch(
            bus,
            names.bucket_stream(self._bucket),
            f"{names.key_subject(self._bucket, POOL_KEYS)}.>",
            watch_prefix=f"{names.watch_prefix(app)}.{POOL_KEYS}",
            on_record=self._on_record,
        )
        self._keys = OwnedKeys(
            bus,
            app,
            self._own,
            names.bucket_stream(self._bucket),
            self._complaints,
            subject=self._subject,
            forget=self._watch.forget,
            on_answer=self._changed.set,
        )

    # --- for the app

    @property
    def highest(self) -> int:
        """The highest epoch that this node has ever seen, for the seats of its next session."""
        return max([self._highest, *(self._own.holder(seat)[0] for seat in self._seen)])

    @property
    def replicas(self) -> int | None:
        """How many instances are wanted; None: all nodes."""
        return self.scale.replicas if self.scale is not None else self._declared

    @property
    def seat(self) -> int | None:
        """The seat under which this node is active, or becomes so, or ceases to be; None: none."""
        return self._target if self._reign is not None else None

    def seated(self) -> dict[int, tuple[str, int]]:
        """Node and epoch of each seat whose owner is not known to be over."""
        found: dict[int, tuple[str, int]] = {}
        for seat in sorted(self._seen):
            epoch, session = self._own.holder(seat)
            if session is not None and not self._register.is_over(session):
                found[seat] = session.node, epoch
        return found

    def has_key(self) -> bool:
        """Whether a seat names this session: then a reign runs, or is about to."""
        return any(self._own.holder(seat)[1] == self._session.id for seat in self._seen - self._releasing)

    def holders(self) -> set[SessionId]:
        """The sessions that are named by any seat."""
        return set(self._own.holders())

    def rank(self) -> int:
        """How many nodes see to it before this one that a dead one is fenced."""
        me, fit = self._session.id.node, [n for n, offer in self.candidates.items() if self._is_fit(offer)]
        return sum(1 for node in fit if node < me)

    def set_candidacy(self, eligible: bool, reason: str = "", not_before: float = float("-inf")) -> None:
        """Whether this node may be active, and from when on (``system.now()``'s clock)."""
        self._eligible, self._reason, self._not_before = eligible, reason, not_before
        self._changed.set()

    def on_resumed(self) -> None:
        """The app's pause is over."""
        self._free_since = system.now()
        self._changed.set()

    async def next_reign(self) -> Reign:
        """Wait until this node owns a seat."""
        return await self._reigns.get()

    def successor(self) -> str | None:
        """Who could be active instead of this node; None: nobody who is not so already, or nobody shall."""
        if self._target is not None and self.replicas is not None and self._target >= self.replicas:
            return None
        seated = {node for node, _ in self.seated().values()}
        fit = [node for node, offer in self.candidates.items() if self._is_fit(offer) and node not in seated]
        return next(iter(ranked(self._app, fit)), None)

    def _is_fit(self, offer: Candidate) -> bool:
        me = self._session.id
        return offer.eligible and offer.session != me and not self._register.is_over(offer.session)

    def check_successor(self, node: str) -> str:
        """Raises ConfigError: in a pool nobody is named, the next one takes the seat by itself."""
        problem = f"app {self._app} is a pool: whoever is fit takes the place of an instance that ends"
        raise ConfigError("node", node, problem, "leave the node out")

    def keep_key(self, reign: Reign) -> None:
        """The node ends in a pause: its section has ended or was left running, and the seat stays its."""
        self._kept, self._reign = True, None

    async def release(self, reign: Reign, reason: str, successor: str | None = None) -> None:
        """Give the seat back. Call only when the active section has ended.

        If NATS does not answer, the release is tried again until the session ends.
        """
        seat = self._target
        assert seat is not None, "a reign is that over a seat"
        self._reign = None
        self._releasing.add(seat)
        self._released.clear()
        self._aim(None)
        self._own.on_ended(seat)
        self._changed.set()
        if self._session.is_valid and self._own.holder(seat)[1] == self._session.id:
            await wait_at_most(self._released, RELEASE_SECONDS)

    # --- the loop

    async def run(self) -> None:
        """Watch and act until cancelled."""
        stop_listening = self._bus.on_connection(self._on_connection)
        self._register.on_over(self._on_session_over)
        self._session.on_change(self._changed.set)
        try:
            await self._watch.start()
            self._joined_at = self._free_since = system.now()
            self._inherited = {
                epoch for epoch, who in map(self._own.holder, self._seen) if who == self._session.id
            }
            while True:
                self._changed.clear()
                wait = self._step()
                self._on_change()
                await wait_at_most(self._changed, None if wait is None else max(0.001, wait))
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
        if self._kept:
            return None
        session, now = self._session, system.now()
        valid, may_begin = session.is_valid, session.may_begin
        self._noted.are({*self._own.holders(), *(offer.session for offer in self.candidates.values())})
        self._note_released()
        moments = [self._choose(now, may_begin)]
        for action in self._own.step(valid=valid, may_begin=may_begin):
            match action:
                case Begin(seat, epoch):
                    self._begin(seat, epoch, now)
                case End(_, _, reason, hard):
                    self._end(reason, hard=hard)
                case Write() | Read():
                    self._seen.add(action.partition)
                    if isinstance(action, Write) and action.take:
                        self._before[action.partition] = self._own.holder(action.partition)
                    self._keys.carry_out(action)
        if valid:
            ends = session.valid_until
            moments.append(session.timing.stand_down_at(ends) if may_begin else ends)
            moments.append(self._tell(now))
        due = [moment for moment in moments if now < moment < float("inf")]
        return min(due) - now if due else None

    def _choose(self, now: float, may_begin: bool) -> float:
        """Settle on a seat, or on none; the moment to look again."""
        if any(self._is_mine_or_open(seat) for seat in self._releasing):
            return float("inf")  # one at a time
        mine = self._mine()
        action = next_seat(self._view(mine, may_begin), now, self._register.is_over)
        match action:
            case Take(seat):
                self._aim(seat)
            case Leave(reason):
                if mine is not None and self._reign is None:
                    self._releasing.add(mine)
                elif self._reign is not None:
                    self._reign.end(reason)
                    return float("inf")
                self._aim(None)
            case Wait(until):
                self._aim(None)
                return until
        return float("inf")

    def _is_mine_or_open(self, seat: int) -> bool:
        return not self._own.is_settled(seat) or self._own.holder(seat)[1] == self._session.id

    def _mine(self) -> int | None:
        """The seat that this node acts for, or that is about to be its own."""
        if self._reign is not None or (self._target is not None and self._is_mine_or_open(self._target)):
            return self._target
        held = [s for s in self._seen if self._own.holder(s)[1] == self._session.id]
        return min(held, default=None)

    def _aim(self, seat: int | None) -> None:
        if seat == self._target and self._reign is not None:
            return
        self._target = seat
        plan: list[str | None] = [None] * MAX_SEATS
        if seat is not None:
            plan[seat] = self._session.id.node
        self._own.on_plan(plan)

    def _view(self, mine: int | None, may_begin: bool) -> SeatView:
        return SeatView(
            self._session.id,
            self._app,
            {seat: self._own.holder(seat)[1] for seat in self._seen},
            mine,
            self.replicas,
            tuple(self.candidates.values()),
            self._eligible and may_begin,
            self._paused(),
            self._not_before,
            self._joined_at,
            self._free_since,
        )

    def _begin(self, seat: int, epoch: int, now: float) -> None:
        adopted = self._adopted if epoch in self._inherited else epoch
        taken_up = self._session.is_taken_up
        if begins_anew(epoch, highest=self._highest, is_taken_up=taken_up, adopted=adopted):
            # Nothing of it runs here: the key is written again, and is past that epoch then; or given back.
            self._own.on_ended(seat)
            if not self._eligible:
                self._releasing.add(seat)
                self._aim(None)
            self._changed.set()
            return
        self._target = seat
        self._reign = reign = Reign(Epoch(epoch), Fence(self._subject(seat), epoch))
        self._on_acquired(seat, self._succession(seat, epoch, now))
        self._reigns.put_nowait(reign)

    def _end(self, reason: str, *, hard: bool) -> None:
        if self._reign is not None:
            self._reign.end(reason, deposed=hard)

    def _succession(self, seat: int, epoch: int, now: float) -> Succession:
        before_epoch, before = self._before.get(seat, (0, None))
        how = reason = ""
        if before is not None:
            how, reason = "session-over", self._why_over(before)
        elif before_epoch:
            how = "released"
        vacant = max(0.0, now - self._free_since)
        return Succession(
            epoch,
            system.wall(),
            before.node if before is not None else "",
            before_epoch if before is not None else 0,
            how,
            reason,
            vacant_seconds=vacant,
        )

    def _note_released(self) -> None:
        """What was to be given back and has been."""
        for seat in list(self._releasing):
            if not self._is_mine_or_open(seat):
                self._releasing.discard(seat)
        if not self._releasing:
            self._released.set()

    def _subject(self, seat: int) -> str:
        return self._names.key_subject(self._bucket, self._names.seat_key(seat))

    # --- the offer

    def _tell(self, now: float) -> float:
        """Have the others know what is so; the moment at which that changes by itself."""
        offer = Candidate(self._session.id, self._eligible, reason=self._reason)
        if self._eligible and now < self._not_before:
            # Nobody shall leave a seat to it meanwhile.
            offer = Candidate(self._session.id, False, reason="stepping aside for a while")
        if offer != self._told and not self._telling:
            self._telling, self._told = True, None
            self._background.spawn(self._publish(offer), f"pool {self._app} offer")
        return self._not_before

    async def _publish(self, offer: Candidate) -> None:
        key = self._names.pool_member_key(self._session.id.node)
        subject = self._names.key_subject(self._bucket, key)
        try:
            await self._bus.write(subject, _encode(offer), timeout=REQUEST_TIMEOUT_SECONDS)
        except BusError as error:
            self._complaints.tell("the offer to be an instance", error)
            await asyncio.sleep(RETRY_SECONDS)
        else:
            self._told = offer
        self._telling = False
        self._changed.set()

    # --- what was seen

    def _on_connection(self, event: Connection) -> None:
        if event is Connection.CONNECTED:
            self._own.on_reconnected()
            self._changed.set()

    def _on_session_over(self, session: SessionId) -> None:
        self._own.on_session_over(session)
        self._free_since = system.now()
        self._changed.set()

    def _on_record(self, record: Record) -> None:
        key = record.subject.removeprefix(self._names.key_subject(self._bucket, ""))
        kind, _, rest = key.removeprefix(f"{POOL_KEYS}.").partition(".")
        if key == POOL_SCALE_KEY:
            self.scale = None if record.removed else _scale_of(record.data)
            self._free_since = system.now()
        elif kind == "member":
            self._on_member(rest, record)
        elif kind == "seat" and rest.isdecimal() and int(rest) < MAX_SEATS:
            self._on_seat(int(rest), record)
        self._changed.set()

    def _on_seat(self, seat: int, record: Record) -> None:
        holder = holder_in(record)
        self._seen.add(seat)
        self._own.on_record(seat, record.revision, holder)
        if holder is None:
            self._free_since = system.now()

    def _on_member(self, node: str, record: Record) -> None:
        if record.removed:
            self.candidates.pop(node, None)
        else:
            self.candidates[node] = _candidate_of(record.data)
        if node == self._session.id.node and self.candidates.get(node) != self._told:
            # What was sent long ago, or by an earlier life, may have arrived after all: say it again.
            self._told = None


async def write_scale(bus: Bus, names: Names, app: str, scale: PoolScale | None) -> PoolScale | None:
    """Leave word how many instances the pool *app* shall have; None: what is declared counts again.

    Returns what was said before, None: nothing. Raises BusError.
    """
    bucket = names.app_bucket(app)
    stream, subject = names.bucket_stream(bucket), names.key_subject(bucket, POOL_SCALE_KEY)
    while True:
        there = await bus.read(stream, subject)
        before = None if there is None or there.removed else _scale_of(there.data)
        if scale is None and before is None:
            return None
        data = _encode(scale) if scale is not None else b""
        headers = {} if scale is not None else {"KV-Operation": "DEL"}
        try:
            await bus.write(subject, data, expect=there.revision if there is not None else 0, headers=headers)
        except WrongRevision:
            continue  # somebody else had a word at the same moment
        return before


__all__ = ["Seats", "write_scale"]
