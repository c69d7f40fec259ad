"""A node: observer, election, one app, as ``coord.register`` and ``coord.election`` drive them."""

from __future__ import annotations

import math
import operator
from typing import Any

from phalanx.decide import election
from phalanx.decide.keeper import Phase, next_phase_at, phase
from phalanx.decide.pause import Cause, ends_section
from phalanx.decide.session import SessionBody, StreamList, Tombstone
from phalanx.types import Candidate, LeaderRecord, SessionId

from .host import PIPE, Host, Keeper, Process
from .nats import NOT_NOMINATED, REFUSED, UNANSWERED, Pausing
from .things import ADDRESS, PROGRAM, Thing, end_by_node
from .world import Section

RPC_TIMEOUT = 1.0
RETRY = 0.1
PROBE_TIMEOUT = 0.05
STOP_TIMEOUT = 0.4
"""A program that has not ended by then is killed."""
SESSION_TIMEOUT = 4.0
"""After which a node tries it with a new session."""

_revision = operator.itemgetter(0)


class Node(Process):
    """One life of a node: one session, one keeper, one observer."""

    kind = "node"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.life = host.lives * 8 + host.index
        self.timing = self.world.timing
        self.session = SessionId(host.name, str(host.lives))
        self.keeper: Keeper | None = None
        self.watch_lag = self.watch_drop = 0.0
        self.valid_until = float("-inf")
        self.established = self.ready = self.ended = False
        self.streams: StreamList
        self.observer: Any = None
        self.leader = LeaderRecord(0)
        self.vacant_since = host.clock()
        self.candidates: dict[str, Candidate] = {}
        self.not_before = float("-inf")
        self.pause: Pausing = (0, False)
        self.nomination = NOT_NOMINATED
        self.reign: int | None = None
        self.last_reign = 0
        self.section: Section | None = None
        self.section_things: list[Thing] = []
        self.end_takes = 0.05
        self.successor: str | None = None
        self.stopping = False
        self._unreleased: tuple[int, str | None] | None = None
        self._deposed = False
        self._held = ""
        self._has_read_bucket = False
        self._busy = False
        self._verify = False
        self._asked: dict[str, bool] = {}
        self._caught_up: dict[str, float] = {}
        self._revisions: dict[tuple[str, SessionId], int] = {}
        self._burying: set[tuple[str, SessionId]] = set()
        self._disconnected_at: float | None = None
        self._connected_at = self.world.now
        self._tick_at = float("inf")
        self._repair: tuple[str, StreamList, float] | None = None

    # --- what is so

    @property
    def may_work(self) -> bool:
        """Whether code of an active section could run at this moment."""
        return self.alive and not self.stopped

    @property
    def keeper_runs(self) -> bool:
        """Whether its keeper could kill it at this moment."""
        return self.keeper is not None and self.keeper.alive and not self.keeper.stopped

    @property
    def paused(self) -> bool:
        """As far as this node was told."""
        return self.pause[1]

    def session_valid(self) -> bool:
        """As far as this node was told."""
        return self.ready and not self.ended and self.host.clock() < self.valid_until

    def settled_since(self) -> float:
        """How long nothing has been wrong with this node and its keeper; 0 if something is."""
        fine = (
            self.alive
            and self.may_work
            and not self.blocked
            and self.keeper_runs
            and self.session_valid()
            and not self.stopping
            and self.not_before < self.host.clock()
            and not self._asked
            and self.nats.connected(self)
        )
        return self.world.now - self._connected_at if fine else 0.0

    # --- start

    def start(self) -> None:
        """Connect, read the configuration, start the keeper."""
        self.world.log(self.name, f"starts as {self.session}")
        self.connect()
        self._boot()
        self.tick()

    def _boot(self) -> None:
        self.nats.call(self, None, lambda: self.nats.bucket.streams, RPC_TIMEOUT, self._booted)

    def _booted(self, streams: Any) -> None:
        if streams is UNANSWERED:
            self.timer(0.2, self._boot)
            return
        self.streams = streams
        self.observer = self.world.rules.observer(streams, self.timing, self.host.clock())
        for name in streams.all_streams:
            self.ask(name, interrupted=True)
        self.ask("bucket", interrupted=True)
        self.keeper = keeper = self.host.keeper = Keeper(self, self.session, streams)
        self.world.after(PIPE, keeper.run, self.host.lock.take, keeper, self.world.now)
        self.timer(SESSION_TIMEOUT, self._no_session)

    def _no_session(self) -> None:
        if not self.established:
            self.world.count("sessions given up before they were there")
            self.die("no session in time")

    def on_established(self) -> None:
        """The session is there: look whether the list of streams is still the one it was made under."""
        self.established = True
        self.nats.call(self, None, lambda: self.nats.bucket.streams, RPC_TIMEOUT, self._confirmed)

    def _confirmed(self, streams: Any) -> None:
        if streams is UNANSWERED:
            self.nats.call(self, None, lambda: self.nats.bucket.streams, RPC_TIMEOUT, self._confirmed)
        elif streams.generation != self.streams.generation and not self.ready:
            self.world.count("starts again under a new stream list")
            self.leave()
        else:
            self.ready = True
            self._offer()
            self.step()

    def _offer(self) -> None:
        host = self.host
        offer = Candidate(self.session, not self.stopping, host.priority, no_failover=host.no_failover)
        self.nats.call(self, None, lambda: self.nats.offer(offer), RPC_TIMEOUT, self._offered)

    def _offered(self, result: Any) -> None:
        if result is UNANSWERED:
            self.timer(RETRY, self._offer)

    def on_valid_until(self, moment: float) -> None:
        """The keeper renewed."""
        self.valid_until = max(self.valid_until, moment)

    def on_lost(self, reason: str) -> None:
        """The session is over: everything that hangs on it must end at once."""
        self._session_gone(f"session lost: {reason}")

    def on_keeper_gone(self) -> None:
        """Nobody renews, nobody would fence this node."""
        self._session_gone("its keeper is gone")

    def on_released(self) -> None:
        """A majority knows that the session is over."""
        self._session_gone("its session is released")

    def _session_gone(self, why: str) -> None:
        if not self.ended:
            self.ended = True
            if self.section is not None and self.section.state != "starting":
                self.world.count("nodes that fenced themselves")
            self._fence(why)

    def _fence(self, why: str) -> None:
        things = self.section_things if self.section is not None else []
        self.die(why)
        end_by_node(things)

    # --- the regular look

    def tick(self) -> None:
        """Beat, deadlines, tombstones, election."""
        keeper, now = self.keeper, self.host.clock()
        if keeper is not None:
            self.world.after(PIPE, keeper.run, keeper.on_beat)
        self.step()
        if not self.alive:
            return
        moment = now + 0.3
        if self.section is not None:
            moment = min(moment, next_phase_at(now, self.valid_until, self.timing))
        if self.observer is not None:
            moment = min(moment, self.observer.next_check(now))
        self._tick_in(moment - now)

    def _tick_in(self, delay: float) -> None:
        at = self.world.now + max(0.002, delay) / self.host.rate
        if at < self._tick_at - 1e-9:
            self._tick_at = at
            self.world.at(at, self.run, self._ticked, at)

    def _ticked(self, at: float) -> None:
        if at >= self._tick_at - 1e-9:
            self._tick_at = float("inf")
            self.tick()

    def step(self) -> None:
        """All decisions that may be due."""
        now = self.host.clock()
        if self.section is not None:
            self._watch_deadline(now)
            if not self.alive:
                return
            section = self.section
            if section and now >= self.valid_until:
                self.world.fail("G1", f"{self.name} goes on in a section although its session has run out")
        if self.observer is None:
            return
        self._bury(now)
        if self._repair is not None:
            self._settle()
        self._elect(now)

    def _watch_deadline(self, now: float) -> None:
        rules = self.world.rules
        if rules.broken == "node-ignores-deadline" or not rules.session_ends_section(paused=self.paused):
            return
        match phase(now, self.valid_until, self.timing):
            case Phase.WORK:
                away = self._disconnected_at
                if away is not None and now - away > self.timing.ttl and not self.paused:
                    self.end("this node's own connection is gone")
            case Phase.STAND_DOWN:
                self.world.count("stand-downs before the deadline")
                self.end("the session runs out")
            case Phase.FENCE | Phase.OVER:
                self.world.count("nodes that fenced themselves")
                self._fence("its fence budget begins")

    # --- sessions

    def _bury(self, now: float) -> None:
        for tombstone in self.observer.tombstones(now, except_for=self.session):
            key = (tombstone.stream, tombstone.session)
            if key not in self._burying:
                self._burying.add(key)
                self._send_tombstone(tombstone)

    def _send_tombstone(self, tombstone: Tombstone) -> None:
        nats, stream, session = self.nats, tombstone.stream, tombstone.session
        self.world.count("tombstones by observers")
        self.world.log(self.name, f"buries {session} in {stream} at {tombstone.revision}")
        body = SessionBody(self.observer.streams.generation, True, "expired", self.name)
        expect = None if self.world.rules.no_cas else tombstone.revision
        nats.call(
            self,
            stream,
            lambda: nats.put(stream, session, body, expect),
            0.4,
            self._buried,
            stream,
            session,
            body,
        )

    def _buried(self, result: Any, stream: str, session: SessionId, body: SessionBody) -> None:
        if result is UNANSWERED or result is REFUSED:
            if result is REFUSED:
                self.world.count("tombstones refused")
            self.timer(self.timing.renew_every, self._burying.discard, (stream, session))
            return
        self._burying.discard((stream, session))
        self._tell(self.observer.on_record(stream, session, result, body, self.host.clock()))

    def _tell(self, over: list[SessionId]) -> None:
        for session in over:
            self.world.session_over(session, self.name)
            if self.leader.session == session:
                self.vacant_since = self.host.clock()
        if over:
            self.step()

    # --- watches

    def watched(self, conn: Any, channel: str, handler: str, args: tuple[Any, ...]) -> None:
        """A republished message comes in over the connection it was sent on."""
        if conn is None or conn == self.conn:
            self.run(getattr(self, handler), channel, *args)

    def on_session(
        self, stream: str, session: SessionId, revision: int, body: SessionBody, before: int
    ) -> None:
        """A session key was written."""
        if self.observer is None:
            return
        if before > self._revisions.get((stream, session), 0):
            self.ask(stream, interrupted=True)
        self._revisions[stream, session] = revision
        over = self.observer.on_record(stream, session, revision, body, self.host.clock())
        if over:
            self._tell(over)

    def on_bucket(self, _channel: str, what: str, value: Any, before: int) -> None:
        """A key of the bucket was written."""
        if self.observer is None:
            return
        if what == "leader":
            if before > self.leader.revision:
                self.ask("bucket", interrupted=True)
            self._learn(value)
        elif what == "offer":
            self.candidates[value.session.node] = value
        elif what == "pause":
            self._learn_pause(value)
        elif what == "nomination":
            self.nomination = max(self.nomination, value, key=_revision)
        else:
            self._use_streams(value)
        self.step()

    def ask(self, channel: str, *, interrupted: bool) -> None:
        """Read the whole state of a stream, until that works."""
        if channel in self._asked:
            self._asked[channel] = self._asked[channel] or interrupted
            return
        self._asked[channel] = interrupted
        self._catch_up(channel)

    def _catch_up(self, channel: str) -> None:
        asked_at = self.host.clock()
        interrupted, self._asked[channel] = self._asked[channel], False
        nats = self.nats
        if channel == "bucket":
            nats.call(self, None, nats.bucket_state, RPC_TIMEOUT, self._bucket_state)
        else:
            nats.call(
                self,
                channel,
                lambda: nats.state(channel),
                RPC_TIMEOUT,
                self._caught,
                channel,
                interrupted,
                asked_at,
            )

    def _caught(self, keys: Any, channel: str, interrupted: bool, asked_at: float) -> None:
        if channel not in self.observer.streams.all_streams:
            del self._asked[channel]
            return
        if keys is UNANSWERED:
            self._asked[channel] = interrupted or self._asked[channel]
            self.timer(0.1, self._catch_up, channel)
            return
        again = self._asked.pop(channel)
        for session, (revision, _) in keys.items():
            self._revisions[channel, session] = revision
        over = self.observer.on_catch_up(
            channel, keys, self.host.clock(), interrupted=interrupted, asked_at=asked_at
        )
        self._caught_up[channel] = asked_at
        self._tell(over)
        if again and self.alive:
            self.ask(channel, interrupted=True)

    def _bucket_state(self, state: Any) -> None:
        if state is UNANSWERED:
            self.timer(0.1, self._catch_up, "bucket")
            return
        again = self._asked.pop("bucket")
        leader, offers, streams, pause, nomination = state
        self._learn(leader)
        self._learn_pause(pause)
        self.nomination = max(self.nomination, nomination, key=_revision)
        self._has_read_bucket = True
        for offer in offers:
            self.candidates.setdefault(offer.session.node, offer)
        self._use_streams(streams)
        if again:
            self.ask("bucket", interrupted=True)
        self.step()

    def resync(self) -> None:
        """What a watch does now and then, to be sure."""
        if self.observer is not None:
            for name in self.observer.streams.all_streams:
                self.ask(name, interrupted=False)
            self.ask("bucket", interrupted=False)

    def on_connected(self) -> None:
        """All watches were interrupted; the leader key must be verified."""
        self._disconnected_at = None
        self._connected_at = self.world.now
        if self.observer is None:
            return
        self.world.count("watch restarts")
        self._verify = True
        for name in self.observer.streams.all_streams:
            self.ask(name, interrupted=True)
        self.ask("bucket", interrupted=True)
        self.step()

    def on_disconnected(self) -> None:
        """From now on others may miss this node."""
        self._disconnected_at = self.host.clock()

    # --- the list of streams

    def _use_streams(self, streams: StreamList) -> None:
        if streams.generation <= self.observer.streams.generation:
            return
        new = set(streams.all_streams) - set(self.observer.streams.all_streams)
        self._tell(self.observer.on_streams(streams, self.host.clock()))
        for name in sorted(new):
            self.ask(name, interrupted=True)
        keeper = self.keeper
        if keeper is not None:  # after the observer: who sees the new list used may trust that it is watched
            self.world.after(PIPE, keeper.run, keeper.on_streams, streams)

    def replace_streams(self, following: tuple[str, ...]) -> None:
        """First step of a replacement."""
        if self.observer is None or not self.session_valid() or self.observer.streams.is_joint:
            return
        now = self.observer.streams
        if self.world.rules.broken == "single-list-switch":
            then = StreamList(now.generation + 1, following)
        else:
            then = now.joint_with(following)
        self.nats.call(
            self, None, lambda: self.nats.use_streams(then, now.generation), RPC_TIMEOUT, self._joined, then
        )

    def _joined(self, result: Any, streams: StreamList) -> None:
        if result is UNANSWERED or result is REFUSED:
            return
        self._use_streams(streams)
        if streams.is_joint:
            self._repair = ("settle", streams, self.host.clock())

    def take_over_repair(self) -> None:
        """A joint list that somebody left behind is brought to its end by whoever finds it."""
        if self.observer is not None and self.observer.streams.is_joint and self._repair is None:
            self._repair = ("settle", self.observer.streams, self.host.clock())
            for name in self.observer.streams.all_streams:
                self.ask(name, interrupted=False)

    def _settle(self) -> None:
        """Second step, once all streams were read after the first and every live session uses both lists.

        Read after the first: a session that was made under the old list just before must be known here.
        """
        assert self._repair is not None
        _, joint, since = self._repair
        if self.observer.streams.generation != joint.generation:
            self._repair = None
            return
        if any(self._caught_up.get(name, float("-inf")) < since for name in joint.all_streams):
            for name in joint.all_streams:
                if self._caught_up.get(name, float("-inf")) < since:
                    self.ask(name, interrupted=False)
            return
        if any(self.observer.seen_generation(s) < joint.generation for s in self.observer.live()):
            return
        self._repair = None
        then = joint.settled()
        self.world.count("stream lists replaced")
        self.nats.call(
            self,
            None,
            lambda: self.nats.use_streams(then, joint.generation),
            RPC_TIMEOUT,
            self._settled,
            then,
        )

    def _settled(self, result: Any, streams: StreamList) -> None:
        if result is not UNANSWERED and result is not REFUSED:
            self._use_streams(streams)

    # --- the election

    def _learn(self, record: LeaderRecord) -> None:
        if record.revision <= self.leader.revision:
            return
        self.leader = record
        if record.session is None:
            self.vacant_since = self.host.clock()
        else:
            self.observer.note(record.session, self.host.clock())
            if self.observer.is_over(record.session):
                self.vacant_since = self.host.clock()

    def _leader_over(self) -> bool:
        holder = self.leader.session
        if holder is None:
            return False
        if self.world.rules.broken == "leader-key-before-session-over" and holder != self.session:
            due = self.observer.tombstones(self.host.clock() + 0.4 * self.timing.ttl, except_for=self.session)
            if any(t.session == holder for t in due):
                return True
        return self.observer.is_over(holder)

    def _elect(self, now: float) -> None:
        if self._busy or self.conn is None or not self._has_read_bucket:
            return
        if self._verify and self.reign is not None:
            self._busy = True
            self.nats.call(self, None, lambda: self.nats.bucket.leader, RPC_TIMEOUT, self._verified)
            return
        if self._unreleased is not None:
            self._send_release()
            return
        view = election.View(
            me=self.session,
            session_valid=self.session_valid(),
            eligible=not self.stopping,
            leader=self.leader,
            leader_over=self._leader_over(),
            vacant_since=self.vacant_since,
            candidates=tuple(self.candidates.values()),
            not_before=self.not_before,
            leading=self.reign,
            ended=self.last_reign,
            no_failover=self.host.no_failover and self.world.rules.broken != "no-failover-takes-over",
            nomination=self.nomination[1],
            paused=self.paused and self.world.rules.broken != "taken-in-a-pause",
        )
        match election.next_action(view, now, self.observer.is_over):
            case election.Acquire(expected):
                self._busy = True
                knew = self.pause
                self.nats.call(
                    self, None, lambda: self.nats.lead(self.session, None, expected, knew), RPC_TIMEOUT,
                    self._acquired, expected,
                )  # fmt: skip
            case election.Begin(epoch):
                self._begin(epoch)
            case election.Deposed(reason):
                self._deposed = self._deposed or self.session_valid()
                self.end(reason)
            case election.Wait(until):
                self._tick_in(until - now)
            case election.Idle():
                pass

    def _acquired(self, result: Any, expected: int) -> None:
        if result is UNANSWERED or result is REFUSED:
            self.nats.call(self, None, lambda: self.nats.bucket.leader, RPC_TIMEOUT, self._read_back)
            return
        self._busy = False
        self._learn(LeaderRecord(result, self.session))
        if self.leader.revision == result:
            self._begin(result)
        self.step()

    def _read_back(self, record: Any) -> None:
        if record is not UNANSWERED:
            self._learn(record)
            self._busy = False
            self.step()
        else:
            self.timer(RETRY, self._idle)

    def _idle(self) -> None:
        self._busy = False
        self.step()

    def _verified(self, record: Any) -> None:
        self._busy = False
        if record is UNANSWERED:
            self._retry()
            return
        self._verify = False
        if self.reign is not None and record.revision != self.reign:
            self._deposed = True
            self.end(f"after a reconnection the leader key is at {record.revision}")
        self.step()

    # --- the app

    def _begin(self, epoch: int) -> None:
        if self.reign is not None or not self.session_valid():
            return
        self.reign, self._deposed, self.successor, self._held = epoch, False, None, ""
        self.section = section = Section(self, epoch)
        self.section_things = []
        self.world.log(self.name, f"reigns at epoch {epoch}")
        keeper = self.keeper
        if keeper is not None:
            self.world.after(PIPE, keeper.run, keeper.on_register, section)

    def on_registered(self, section: Section) -> None:
        """The keeper would kill it from now on: begin, unless it is too late."""
        if section is not self.section or section.state != "starting":
            return
        if (
            not self.session_valid()
            or phase(self.host.clock(), self.valid_until, self.timing) is not Phase.WORK
        ):
            self._over(section)
            return
        self.world.start_section(section)
        self._write_fenced(section.epoch)
        self._register_thing(Thing(section, ADDRESS))

    # --- its address and its program

    def _register_thing(self, thing: Thing) -> None:
        self.host.things = [other for other in self.host.things if other.present] + [thing]
        self.section_things.append(thing)
        if thing.kind == PROGRAM and self.world.rules.broken == "started-before-registered":
            self.on_thing_registered(thing)
        elif self.keeper is not None:
            self.world.after(PIPE, self.keeper.run, self.keeper.on_register_thing, thing)

    def on_thing_registered(self, thing: Thing) -> None:
        """From now on it would be killed: start it, unless the section ends already."""
        section = thing.section
        if not self._goes_on(section):
            return
        if thing.kind == ADDRESS:
            self._probe(thing, self.host.clock())
            return
        thing.appear()
        section.stop_takes = self.world.rng.choice((0.005, 0.02, 0.02, 0.1, 0.1, 0.2, STOP_TIMEOUT))
        takes = self.world.rng.choice((0.01, 0.01, 0.05, 0.2, 1.0))
        self.timer(takes, self._started, thing, self.world.rng.random() < 0.04)

    def _goes_on(self, section: Section) -> bool:
        return section is self.section and section.state == "active" and self.session_valid()

    def _probe(self, thing: Thing, since: float) -> None:
        if not self._goes_on(thing.section):
            return
        taken = self.world.address_elsewhere(self.host)
        if taken and self.world.rules.broken != "address-not-probed":
            self.world.count("addresses that somebody else still answered for")
            if self.host.clock() - since > math.ceil(self.timing.ttl) + 1.5:
                self.world.fail("address", f"{self.name} still finds it elsewhere after its lifetime")
            self.timer(0.1, self._probe, thing, since)
        else:
            self.timer(PROBE_TIMEOUT, self._put, thing)

    def _put(self, thing: Thing) -> None:
        if self._goes_on(thing.section):
            thing.appear()
            self._prolong(thing)
            self._register_thing(Thing(thing.section, PROGRAM))

    def _prolong(self, thing: Thing) -> None:
        left = self.valid_until - self.host.clock()
        if thing.present and not thing.dying and thing.section is self.section:
            if left > 0:
                thing.prolong(math.ceil(min(self.timing.ttl, left)))
            self.timer(self.timing.ttl / 4, self._prolong, thing)

    def address_lost(self, section: Section) -> None:
        """The kernel has removed it."""
        if section is self.section and section.state == "active":
            self.end("its address is gone")

    def _started(self, thing: Thing, fails: bool) -> None:
        if thing.section is not self.section:
            return
        if fails:
            thing.vanish("its start has failed")
            self.world.count("starts of a program that failed")
            self.end("its program cannot be started")
        elif thing.present:
            thing.section.serving = True

    def _stop_program(self, section: Section) -> None:
        """Gracefully: after that it is killed, if it does not end."""
        if section is not self.section:
            return
        running = [thing for thing in self.section_things if thing.present and thing.kind == PROGRAM]
        if not running:
            self._stopped(section)
        elif section.stop_takes < STOP_TIMEOUT:
            self.timer(section.stop_takes, self._stopped, section)
        else:
            self.world.count("programs that had to be killed")
            self.timer(STOP_TIMEOUT, self._kill_program, section)

    def _kill_program(self, section: Section) -> None:
        if section is not self.section:
            return
        running = [thing for thing in self.section_things if thing.present and thing.kind == PROGRAM]
        for thing in running:
            thing.kill()
        if running:
            self.timer(0.01, self._kill_program, section)
        else:
            self._stopped(section)

    def _stopped(self, section: Section) -> None:
        if section is not self.section:
            return
        for kind in (PROGRAM, ADDRESS):
            for thing in self.section_things:
                if thing.kind == kind:
                    thing.vanish("ended")
                    if self.keeper is not None:
                        self.world.after(PIPE, self.keeper.run, self.keeper.on_unregister_thing, thing)
        self._over(section)

    def _write_fenced(self, epoch: int) -> None:
        """A leader's write; and now and then one whose epoch is long gone."""
        self.nats.call(self, None, lambda: self.nats.fenced(epoch), RPC_TIMEOUT, self._written, epoch)

    def _written(self, result: Any, epoch: int) -> None:
        if result is not REFUSED or self.reign == epoch:
            self.timer(self.world.rng.uniform(0.5, 1.5), self._write_fenced, epoch)

    def end(self, reason: str, successor: str | None = None) -> None:
        """Begin to end the active section, gracefully."""
        section = self.section
        if section is None or section.state == "ending":
            return
        self.world.log(self.name, f"ends its section: {reason}")
        self.successor = section.successor = successor
        if section.state == "starting":
            self._over(section)
            return
        section.state = "ending"
        self.timer(self.end_takes, self._stop_program, section)

    def _over(self, section: Section) -> None:
        if section is not self.section:
            return
        self.world.end_section(section, "gracefully")
        keeper, epoch = self.keeper, section.epoch
        self.section = self.reign = None
        self.last_reign = max(self.last_reign, epoch)
        if keeper is not None:
            self.world.after(PIPE, keeper.run, keeper.on_unregister, section)
        if not self._deposed:
            self._unreleased = (epoch, self.successor)
        self.not_before = self.host.clock() + 1.0
        self.step()

    def _send_release(self) -> None:
        assert self._unreleased is not None
        epoch, successor = self._unreleased
        self._busy = True
        self.nats.call(
            self,
            None,
            lambda: self.nats.lead(None, successor, epoch),
            RPC_TIMEOUT,
            self._released,
            epoch,
            successor,
        )

    def _released(self, result: Any, epoch: int, successor: str | None) -> None:
        self._busy = False
        if result is UNANSWERED:
            self._retry()
        elif result is REFUSED:
            # It proves nothing: read before this is taken for done.
            self._busy = True
            self.nats.call(
                self, None, lambda: self.nats.bucket.leader, RPC_TIMEOUT, self._release_read, epoch
            )
        else:
            if successor is not None:
                self.world.count("hand-overs to a named successor")
            self._learn(LeaderRecord(result, None, successor))
            self._release_done()

    def _release_read(self, record: Any, epoch: int) -> None:
        self._busy = False
        if record is not UNANSWERED:
            self._learn(record)
        if record is UNANSWERED or self.leader.revision == epoch:
            self._retry()
        else:
            self._release_done()

    def _release_done(self) -> None:
        self._unreleased = None
        if self.stopping:
            self.leave()
        self.step()

    def _retry(self) -> None:
        self._busy = True
        self.timer(RETRY, self._idle)

    def hand_over(self) -> None:
        """An operator's stepdown: the successor is named while the old section is still active."""
        if self.section is not None and self.section.state == "active" and not self.paused:
            self.world.count("stepdowns")
            self.end("stepdown", self._choose())

    def fail(self) -> None:
        """Its program, or a check: in a pause that is only reported."""
        if self.section is None or self.section.state == "ending":
            return
        if ends_section(Cause.FAILED, paused=self.paused):
            self.world.count("sections that failed")
            self.end("it fails")
        else:
            self._held = "it failed in a pause"
            self.world.count("failures held in a pause")

    def _learn_pause(self, pause: Pausing) -> None:
        if pause[0] <= self.pause[0]:
            return
        before, self.pause = self.paused, pause
        if before and not self.paused:
            self.vacant_since = max(self.vacant_since, self.host.clock())
            if self._held:
                self.end(self._held)
                self._held = ""

    def _choose(self) -> str | None:
        nomination = self.nomination[1]
        offer = self.candidates.get(nomination.node)
        if (
            nomination.epoch == self.leader.revision
            and offer is not None
            and offer.eligible
            and offer.session != self.session
            and not self.observer.is_over(offer.session)
        ):
            return nomination.node
        return self.world.rules.choose(self.session, self.candidates.values(), self.observer.is_over)

    def terminate(self) -> None:
        """SIGTERM: hand over, end the session, exit."""
        if self.observer is None or not self.ready:
            self.die("SIGTERM before it was ready")
            return
        self.stopping = True
        self._offer()
        if self.section is not None:
            self.end("SIGTERM", self._choose())
        elif self._unreleased is None and not self._busy:
            self.leave()

    def leave(self) -> None:
        """Nothing hangs on the session any more: let the keeper end it."""
        keeper = self.keeper
        self.ready = False
        if keeper is not None:
            self.world.after(PIPE, keeper.run, keeper.on_release)

    # --- stops

    def resume(self) -> None:
        """On waking, a section whose successor has begun must be gone before anything else."""
        section = self.section
        super().resume()
        if self.alive:
            self.step()
        if section is not None and section.excused and section.state != "ended" and not self.blocked:
            self.world.fail("G1", f"{self.name} woke up and went on in the section of epoch {section.epoch}")

    def unblock(self) -> None:
        """User code gives the event loop back."""
        self.blocked = False
        self._flush()
        if self.alive and not self.stopped:
            self.step()

    def on_death(self, how: str) -> None:
        """Its code runs no more; the keeper sees the socket close; a supervisor starts it again."""
        section, self.section = self.section, None
        if section is not None:
            self.world.end_section(section, f"its node died ({how})")
        keeper = self.keeper
        if keeper is not None and keeper.alive:
            self.world.after(self.world.rng.uniform(0.0005, 0.005), keeper.run, keeper.on_node_gone, how)
        if section is not None:
            self._late_write(section.epoch)
        self.host.start_soon()

    def _late_write(self, epoch: int) -> None:
        # What a dead leader had sent may still arrive, long after: the server must refuse it by then.
        nats = self.nats
        self.world.after(self.world.rng.uniform(0.0, 3.0), lambda: nats.fenced(epoch) and None)
