"""One app's election on this node: watches the leader key, takes it, gives it back."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

import msgspec

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.coord.admission import Admission
from phalanx.coord.complaints import Complaints
from phalanx.coord.hold import Holds
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.coord.watch import Watch
from phalanx.decide import election as rules
from phalanx.decide.backoff import Backoff
from phalanx.decide.election import LeaderBody
from phalanx.decide.fencing import to_be_fenced
from phalanx.decide.hold import Takeover
from phalanx.errors import BusError, ConfigError, WrongRevision
from phalanx.names import CANDIDATE_KEYS, LEADER_KEY, MEMBERS_KEY, NOMINATION_KEY, Names
from phalanx.ports import STREAM_NOT_FOUND, Bus, Connection, Fence, Record
from phalanx.types import Candidate, Epoch, LeaderRecord, Nomination, SessionId, Succession

log = logging.getLogger("phalanx.election")

RETRY_SECONDS = 0.1
STALE_SECONDS = 0.2
OFFER_LINGER_SECONDS = 0.1
TIDY_SECONDS = 30.0
RETRIES = Backoff(first=0.1, longest=2.0)
VERIFY_TIMEOUT_SECONDS = 1.0


_leader_of = msgspec.json.Decoder(LeaderBody).decode
_candidate_of = msgspec.json.Decoder(Candidate).decode
_nomination_of = msgspec.json.Decoder(Nomination).decode
_encode = msgspec.json.Encoder().encode


class Reign:
    """One tenure of this node over one app. It ends only by the holder: ask for it with :meth:`end`."""

    def __init__(self, epoch: Epoch, fence: Fence, unfenced: tuple[SessionId, ...] = ()) -> None:
        self.epoch, self.fence = epoch, fence
        self.unfenced = unfenced
        """Earlier leaders' sessions that have to be fenced before anything starts. Whoever has done it
        empties this; what is left at the release is the next leader's to do."""
        self.ending = asyncio.Event()
        self.reason = ""
        self.deposed = False
        """True when the leader key is no longer ours: nothing is left to hand over."""

    def end(self, reason: str, *, deposed: bool = False) -> None:
        """Ask the active section to end. The first reason stays."""
        self.deposed = self.deposed or deposed
        if not self.ending.is_set():
            self.reason = reason
            self.ending.set()


class Election:
    """The leader key of one app. One reign at a time: ``next_reign()``, work, ``release(reign)``."""

    def __init__(
        self,
        bus: Bus,
        names: Names,
        app: str,
        session: Session,
        register: Register,
        *,
        priority: int = 0,
        no_failover: bool = False,
        highest: int = 0,
        adopted: int = 0,
        handicap: Callable[[], float] = lambda: 0.0,
        fences: bool = False,
        holds: Holds | None = None,
        hold: bool = False,
        paused: Callable[[], bool] = lambda: False,
        on_leader: Callable[[LeaderRecord, LeaderRecord], None] = lambda old, new: None,
        on_acquired: Callable[[Succession], None] = lambda succession: None,
    ) -> None:
        self._bus, self._names, self._app = bus, names, app
        self._session, self._register, self._priority = session, register, priority
        self._no_failover = no_failover
        self._on_leader, self._on_acquired, self._handicap = on_leader, on_acquired, handicap
        self._paused, self._adopted = paused, adopted
        self._fences = fences
        self._holds, self._hold = holds, hold
        self._admission = Admission(bus, names, app)
        self._bucket = names.app_bucket(app)
        self._stream = names.bucket_stream(self._bucket)
        self._leader_subject = names.key_subject(self._bucket, LEADER_KEY)
        self.leader = LeaderRecord(0)
        self._before = LeaderRecord(0)
        """What the leader key said before it said ``leader``."""
        self._last_reign = LeaderRecord(0)
        """The last one of somebody who led before ``leader``, or before that was released."""
        self._nomination: Nomination | None = None
        self._vacant_since = system.now()
        self.candidates: dict[str, Candidate] = {}
        self._offer_revisions: dict[str, int] = {}
        self._eligible, self._not_before = False, float("-inf")
        self._reign: Reign | None = None
        self._ended = self._failures = 0
        self._complaints = Complaints(log, app)
        self._highest = highest
        self._unreleased: tuple[int, LeaderBody] | None = None
        self._releasing = asyncio.Lock()
        self._reigns: asyncio.Queue[Reign] = asyncio.Queue(1)
        self._changed = asyncio.Event()
        self._offer: Candidate | None = None
        self._offered: Candidate | None = None
        self._offer_due = self._tidy_at = 0.0
        self._verify = False
        self._watch = Watch(
            bus,
            self._stream,
            f"{names.key_subject(self._bucket, 'election')}.>",
            watch_prefix=f"{names.watch_prefix(app)}.election",
            on_record=self._on_record,
        )

    # --- for the app

    @property
    def highest(self) -> int:
        """The highest epoch that this node has ever seen, for the election of its next session."""
        return max(self._highest, self.leader.revision)

    @property
    def reign(self) -> Reign | None:
        """The present reign of this node, if it has one."""
        return self._reign

    def set_candidacy(self, eligible: bool, reason: str = "", not_before: float = float("-inf")) -> None:
        """Whether this node may lead, and from when on (``system.now()``'s clock)."""
        self._eligible, self._not_before = eligible, not_before
        # A change of mind comes in the middle of a hand-over, which must not wait for it.
        self._offer_due = system.now() + (OFFER_LINGER_SECONDS if self._offered is not None else 0.0)
        direct = self._holds.address if self._holds is not None and self._hold else ""
        me, priority = self._session.id, self._priority
        self._offer = Candidate(me, eligible, priority, reason, self._no_failover, direct)
        self._changed.set()

    def on_resumed(self) -> None:
        """The app's pause is over: a seat that is free counts as free from now on, with all head starts."""
        self._vacant_since = max(self._vacant_since, system.now())
        self._changed.set()

    async def next_reign(self) -> Reign:
        """Wait until this node leads."""
        return await self._reigns.get()

    def successor(self) -> str | None:
        """Who would take over best, or whom an operator has named; None when nobody else is eligible."""
        nomination = self._nomination
        if nomination is not None and nomination.epoch == self.leader.revision:
            offer = self.candidates.get(nomination.node)
            if offer is not None and offer.eligible and not self._register.is_over(offer.session):
                return nomination.node
        return rules.choose_successor(self._session.id, self.candidates.values(), self._register.is_over)

    @property
    def named(self) -> str | None:
        """Who was named to follow a reign that has ended, or that an operator wants ended."""
        return rules.named_successor(self.leader, self._nomination)

    def check_successor(self, node: str) -> str:
        """*node*, if it is a live candidate that could take over. Raises ConfigError if it is not."""
        offers = [o for o in self.candidates.values() if not self._register.is_over(o.session)]
        others = [o for o in offers if o.session != self._session.id]
        able = sorted(o.session.node for o in others if o.eligible)
        if node in able:
            return node
        offer = next((o for o in others if o.session.node == node), None)
        problem = f"is no candidate now: {offer.reason or 'it says so'}" if offer else "is no live standby"
        remedy = f"choose one of {', '.join(able)}" if able else "there is no other eligible node"
        raise ConfigError("node", node, f"{problem} of app {self._app}", remedy)

    def keep_key(self, reign: Reign) -> None:
        """The node ends in a pause: its section has ended or was left running, and the key stays as it is."""
        self._end_reign(reign)

    def _end_reign(self, reign: Reign) -> None:
        self._reign = None
        self._ended = max(self._ended, reign.epoch)
        self._admission.begin(None)
        if self._holds is not None:
            self._holds.end(self._app)

    async def release(self, reign: Reign, reason: str, successor: str | None = None) -> None:
        """Give the leader key back. Call only when the active section has ended.

        If NATS does not answer, the release is tried again until the session ends.
        """
        self._end_reign(reign)
        if not reign.deposed:
            self._unreleased = (reign.epoch, LeaderBody(None, successor, "", reason, reign.unfenced))
            await self._try_release()
        self._changed.set()

    # --- the loop

    async def run(self) -> None:
        """Watch and act until cancelled."""
        stop_listening = self._bus.on_connection(self._on_connection)
        self._register.on_over(self._on_session_over)
        self._session.on_change(self._changed.set)
        try:
            await self._watch.start()
            while True:
                self._changed.clear()
                wait = await self._step()
                await wait_at_most(self._changed, None if wait is None else max(0.001, wait))
        finally:
            stop_listening()
            self._register.off_over(self._on_session_over)
            self._session.off_change(self._changed.set)
            for node in list(self.candidates):
                self._on_offer_removed(node)
            if self.leader.session is not None:
                self._register.unnote(self.leader.session)
            await self._watch.close()
            if self._holds is not None:
                self._holds.end(self._app)

    async def _step(self) -> float | None:
        """Do what is due; returns after how many seconds to look again (None: when something changes)."""
        if self._verify and self._reign is not None and not await self._verify_reign():
            return RETRY_SECONDS
        if self._unreleased is not None and not await self._try_release():
            return RETRY_SECONDS
        now = system.now()
        outlives = self._reign is not None and self._is_held(now) and not self._session.is_valid
        if outlives and self._holds is not None:
            # It goes on without a session, until it can be handed over.
            self._holds.note_nats(self._app, self._bus.is_connected and await self._read_leader())
        action = rules.next_action(self._view(), now, self._register.is_over)
        match action:
            case rules.Acquire(expected, members):
                return await self._acquire(expected, members)
            case rules.Begin(epoch):
                taken_up, adopted = self._session.is_taken_up, self._adopted
                if rules.begins_anew(epoch, highest=self._highest, is_taken_up=taken_up, adopted=adopted):
                    return await self._acquire(epoch)
                self._begin(epoch, 0.0)
            case rules.Deposed(reason):
                if self._reign is not None:
                    self._reign.end(reason, deposed=self._session.is_valid)
            case rules.Wait(until):
                await self._publish_offer()
                return until - now
            case rules.Idle():
                pass
        if outlives:
            return RETRY_SECONDS
        before = system.now()
        if not await self._publish_offer():
            return RETRY_SECONDS
        if not await self._admit():
            return RETRY_SECONDS
        await self._tidy()
        return self._next_look(before)

    def _dead_offers(self) -> list[str]:
        return [n for n, offer in self.candidates.items() if self._register.is_over(offer.session)]

    async def _tidy(self) -> None:
        """The leader removes the offers of nodes that are gone: some never return, under their old names."""
        if self._reign is None or system.now() < self._tidy_at:
            return
        self._tidy_at = system.now() + TIDY_SECONDS
        # With the revisions of now: an offer that is renewed or removed while we wait is not ours to remove.
        dead = [(node, self._offer_revisions[node]) for node in self._dead_offers()]
        for node, revision in dead:
            subject = self._names.key_subject(self._bucket, self._names.candidate_key(node))
            try:
                # A node that returns just now has written a newer revision: then this is refused.
                await self._bus.write(
                    subject,
                    expect=revision,
                    headers={"KV-Operation": "DEL"},
                    timeout=1.0,
                )
            except BusError as error:
                log.debug("app %s: removing the offer of %s: %s", self._app, node, error)

    def _next_look(self, before: float) -> float | None:
        """After how many seconds to look again if nothing else happens. What came since *before* is due."""
        now = system.now()
        moments = [self._not_before]
        if self._offer != self._offered:
            moments.append(self._offer_due)
        if self._reign is not None and self._dead_offers():
            moments.append(self._tidy_at)
        return min((max(0.0, m - now) for m in moments if before < m < float("inf")), default=None)

    async def _admit(self) -> bool:
        """The leader of an app that holds sees to its member list. False: it has to be tried again."""
        if self._reign is None or not self._bus.is_connected:
            return True
        session = self._session
        if session.right_until(self._app) > session.valid_until:
            # The keeper lets it run that long, by the promises of those who are listed now: nobody may join.
            await self._admission.step(self._reign.fence, ())
            return False
        offers = [o for o in self.candidates.values() if not self._register.is_over(o.session)]
        return await self._admission.step(self._reign.fence, offers)

    def _is_held(self, now: float) -> bool:
        return self._holds is not None and self._holds.is_held(self._app, now)

    def _takeover(self) -> Takeover:
        """What it takes to follow who leads now, when that session is over."""
        holder = self.leader.session
        if self._holds is None:
            return Takeover(float("inf")) if holder is not None and self.leader.hold else Takeover()
        gone = holder is None or self._register.ended_itself(holder) or self._holds.is_fenced(holder)
        list_ = self._admission
        me, app = self._session.id.node, self._app
        return self._holds.member.takeover(me, app, self.leader, list_.members, list_.revision, gone=gone)

    def _view(self) -> rules.View:
        holder = self.leader.session
        return rules.View(
            me=self._session.id,
            session_valid=self._session.is_valid,
            eligible=self._eligible and self._session.may_begin,
            leader=self.leader,
            leader_over=holder is not None and self._register.is_over(holder),
            vacant_since=self._vacant_since,
            candidates=tuple(self.candidates.values()),
            not_before=self._not_before,
            leading=self._reign.epoch if self._reign else None,
            handicap_seconds=self._handicap(),
            ended=self._ended,
            no_failover=self._no_failover,
            nomination=self._nomination,
            paused=self._paused(),
            held=self._is_held(system.now()),
            takeover=self._takeover(),
        )

    async def _acquire(self, expected: int, members: int | None = None) -> float | None:
        started = system.now()
        nonce = secrets.token_hex(8)
        me = self._session.id
        unfenced = to_be_fenced(me, self.leader, self._register.ended_itself, fences=self._fences)
        body = LeaderBody(session=me, nonce=nonce, unfenced=unfenced, fences=self._fences, hold=self._hold)
        if self._holds is not None and self.leader.session is not None:
            self._holds.member.attempt(self._app, expected)
        fence = Fence(self._admission.subject, members) if members is not None else None
        try:
            revision = await self._write_past_lost_epochs(_encode(body), expected, fence)
        except WrongRevision:
            # Somebody else was faster; or it was our own write, or a spurious refusal: read back.
            if not await self._read_leader():
                return RETRY_SECONDS
            if members is not None and not await self._read_members():
                return RETRY_SECONDS
            return RETRY_SECONDS if self.leader.revision == expected else None
        except BusError as error:
            self._failures += 1
            self._complaints.tell("taking the leader key", error)
            await self._read_leader()
            return RETRIES.delay(self._failures)
        self._failures = 0
        self._complaints.clear()
        vacant_for = started - self._vacant_since
        self._learn(_record(revision, body))
        if self.leader.revision == revision:
            self._begin(revision, vacant_for)
        return None

    async def _read_members(self) -> bool:
        try:
            if await self._admission.read():
                log.warning("app %s: the stored member list is older than the one that was seen", self._app)
                self._watch.forget(self._admission.subject)
        except BusError as error:
            self._complaints.tell("reading the member list", error)
            return False
        return True

    async def _write_past_lost_epochs(self, body: bytes, expected: int, fence: Fence | None) -> int:
        """Write the leader key; its revision, which is larger than every epoch that this node knows.

        Servers that have lost writes would count the same epochs again: the key is written until it is
        past them.
        """
        while True:
            revision = await self._bus.write(
                self._leader_subject, body, expect=expected, fence=fence, timeout=1.0
            )
            if revision > self._highest:
                return revision
            expected, fence = revision, None

    def _begin(self, epoch: int, vacant_for: float) -> None:
        reign = Reign(Epoch(epoch), Fence(self._leader_subject, epoch), self.leader.unfenced)
        self._reign = reign
        self._tidy_at = system.now() + TIDY_SECONDS
        if self._hold:
            # Before anything of it runs: who has promised something to the reign before may follow this one.
            self._session.withdraw(self._app)
        # If an earlier life of this node has not said there that it holds, anybody may follow.
        if self._holds is not None and self._hold and self.leader.hold:
            self._admission.begin(self._holds.begin(self._app, epoch, self._session))
        self._on_acquired(self._succession(vacant_for))
        self._reigns.put_nowait(reign)

    def _succession(self, vacant_for: float) -> Succession:
        before, last = self._before, self._last_reign
        how = reason = ""
        if before.session is not None and before.session != self._session.id:
            how, reason = "session-over", self._register.why_over(before.session)
        elif last.session is not None or before.revision:
            how, reason = "released", before.reason
        named = rules.named_successor(before, self._nomination) == self._session.id.node
        nominated = self._nomination is not None and self._nomination.epoch == before.revision
        return Succession(
            self.leader.revision,
            system.wall(),
            last.session.node if last.session is not None else "",
            last.revision if last.session is not None else 0,
            how,
            reason,
            named,
            self._nomination.by if self._nomination is not None and named and nominated else "",
            vacant_for,
        )

    async def _try_release(self) -> bool:
        # The loop and release() come here at the same moment: a second write would only be refused.
        async with self._releasing:
            return await self._write_release()

    async def _write_release(self) -> bool:
        if self._unreleased is None:
            return True
        epoch, body = self._unreleased
        body = msgspec.structs.replace(body, nonce=secrets.token_hex(8))
        try:
            revision = await self._bus.write(self._leader_subject, _encode(body), expect=epoch, timeout=1.0)
        except WrongRevision:
            # Replaced, or released by an attempt whose reply was lost; but a refusal proves nothing. While
            # the key is still at our epoch it must not be forgotten: the same reign would begin again.
            if not await self._read_leader() or self.leader.revision == epoch:
                return False
            self._unreleased = None
            return True
        except BusError as error:
            self._complaints.tell(f"releasing epoch {epoch}", error)
            return False
        self._unreleased = None
        self._learn(_record(revision, body))
        return True

    async def _publish_offer(self) -> bool:
        offer = self._offer
        if offer is not None and offer.eligible and system.now() < self._not_before:
            # It steps aside: nobody shall name it as the successor meanwhile.
            offer = msgspec.structs.replace(offer, eligible=False, reason="stepping aside for a while")
        if offer is None or offer == self._offered or system.now() < self._offer_due:
            return True
        subject = self._names.key_subject(self._bucket, self._names.candidate_key(self._session.id.node))
        try:
            await self._bus.write(subject, _encode(offer), timeout=1.0)
        except BusError as error:
            self._complaints.tell("publishing the candidacy", error)
            return False
        self._offered = offer
        return True

    async def _read_leader(self) -> bool:
        """Learn the leader key from the stream's leader. False if it did not answer."""
        try:
            record = await self._bus.read(self._stream, self._leader_subject, timeout=VERIFY_TIMEOUT_SECONDS)
        except BusError as error:
            self._complaints.tell("reading the leader key", error)
            return False
        self._complaints.clear()  # NATS is well again
        await self._learn_from_leader(record)
        return True

    async def _stored_leader(self) -> Record | None:
        """The leader key at the stream's leader; None also when the whole bucket has vanished."""
        try:
            return await self._bus.read(self._stream, self._leader_subject, timeout=VERIFY_TIMEOUT_SECONDS)
        except BusError as error:
            if error.code == STREAM_NOT_FOUND:
                return None
            raise

    async def _verify_reign(self) -> bool:
        """After a reconnection: is the leader key just as we wrote it? (Servers may have lost writes.)"""
        try:
            record = await self._stored_leader()
        except BusError:
            return False
        self._verify = False
        if self._reign is not None and (record is None or record.revision != self._reign.epoch):
            found = record.revision if record else "nothing"
            self._reign.end(f"after a reconnection the leader key is at {found}", deposed=True)
        await self._learn_from_leader(record)
        return True

    # --- what was seen

    def _on_connection(self, event: Connection) -> None:
        if event is Connection.CONNECTED:
            self._verify = True
            self._changed.set()

    def _on_session_over(self, session: SessionId) -> None:
        if self.leader.session == session:
            self._vacant_since = system.now()
        self._changed.set()

    def _on_record(self, record: Record) -> None:
        key = record.subject.removeprefix(self._names.key_subject(self._bucket, ""))
        if key == LEADER_KEY:
            if not record.removed:
                self._learn(_record(record.revision, _leader_of(record.data)))
        elif key == MEMBERS_KEY:
            self._admission.learn(record)
        elif key == NOMINATION_KEY:
            self._nomination = None if record.removed else _nomination_of(record.data)
        elif key.startswith(CANDIDATE_KEYS) and not record.removed:
            self._on_offer(_candidate_of(record.data), record.revision)
        elif key.startswith(CANDIDATE_KEYS):
            self._on_offer_removed(key.removeprefix(f"{CANDIDATE_KEYS}."))
        self._changed.set()

    def _on_offer(self, offer: Candidate, revision: int) -> None:
        before = self.candidates.get(offer.session.node)
        self._register.note(offer.session)
        if before is not None:
            self._register.unnote(before.session)
        self.candidates[offer.session.node] = offer
        self._offer_revisions[offer.session.node] = revision

    def _on_offer_removed(self, node: str) -> None:
        if node == self._session.id.node:
            self._offered = None  # whoever removed it: it is published again
        offer = self.candidates.pop(node, None)
        self._offer_revisions.pop(node, None)
        if offer is not None:
            self._register.unnote(offer.session)

    async def _learn_from_leader(self, record: Record | None) -> None:
        """What the stream's leader has, which counts even if it is older: servers may have lost writes.

        An older answer is asked for a second time: a server that does not know yet that it leads no more
        may have given it.
        """
        found = _leader_record(record)
        if found.revision < self.leader.revision:
            await asyncio.sleep(STALE_SECONDS)
            try:
                found = _leader_record(await self._stored_leader())
            except BusError:
                return
        if found.revision < self.leader.revision:
            log.error(
                "app %s: the leader key went back from revision %d to %d: NATS has lost acknowledged writes",
                self._app,
                self.leader.revision,
                found.revision,
            )
            self._replace(found)
            self._watch.forget(self._leader_subject)
        else:
            self._learn(found)

    def _learn(self, record: LeaderRecord) -> None:
        if record.revision > self.leader.revision:
            self._replace(record)

    def _replace(self, record: LeaderRecord) -> None:
        old, self.leader, self._before = self.leader, record, self.leader
        if self._holds is not None:
            self._holds.saw(self._app, record.revision)
        if old.session is not None:
            self._last_reign = old
        if old.session is not None:
            self._register.unnote(old.session)
        self._highest = max(self._highest, old.revision)
        if record.session is None:
            self._vacant_since = system.now()
        else:
            self._register.note(record.session)
            if self._register.is_over(record.session):
                self._vacant_since = system.now()
        self._changed.set()
        self._on_leader(old, record)


def _leader_record(record: Record | None) -> LeaderRecord:
    """What a stored leader key says; None: nothing is stored."""
    return _record(record.revision, _leader_of(record.data)) if record is not None else LeaderRecord(0)


def _record(revision: int, body: LeaderBody) -> LeaderRecord:
    return LeaderRecord(
        revision, body.session, body.successor, body.nonce, body.reason, body.unfenced, body.fences, body.hold
    )


async def read_leader(bus: Bus, names: Names, app: str) -> LeaderRecord:
    """The leader key of *app* as NATS has it; revision 0 if nobody has ever led. Raises BusError."""
    bucket = names.app_bucket(app)
    return _leader_record(await bus.read(names.bucket_stream(bucket), names.key_subject(bucket, LEADER_KEY)))


async def nominate(bus: Bus, names: Names, app: str, nomination: Nomination) -> None:
    """Leave word who shall follow one reign. Raises BusError."""
    subject = names.key_subject(names.app_bucket(app), NOMINATION_KEY)
    await bus.write(subject, _encode(nomination))
