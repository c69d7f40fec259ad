"""A node: one life, with its session, its keeper, and what it decides and when."""

from __future__ import annotations

from typing import Any

import msgspec

from phalanx.decide.keeper import Phase, next_phase_at, phase
from phalanx.types import Candidate, SessionId

from .app import App
from .away import take_up
from .election import Election
from .hold import Hold
from .host import PIPE, Host, Process
from .keeper import Keeper
from .nats import RETRY, RPC_TIMEOUT, UNANSWERED
from .repair import Repair
from .things import PROGRAM, end_by_node
from .watches import Watches

SESSION_TIMEOUT = 4.0
"""After which a node tries it with a new session."""


class Node(Process):
    """One life of a node: one session, one keeper, one observer."""

    kind = "node"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.life = host.lives * 8 + host.index
        self.timing = self.world.timing
        self.session = SessionId(host.name, str(host.lives))
        self.keeper: Keeper | None = None
        self.watches, self.repair = Watches(self), Repair(self)
        self.election, self.app = Election(self), App(self)
        self.hold = Hold(self) if self.world.holds else None
        self.watch_lag = self.watch_drop = 0.0
        self.valid_until = float("-inf")
        self.established = self.ready = self.ended = False
        self.stopping = self.is_taken_up = False
        self._disconnected_at: float | None = None
        self._connected_at = self.world.now
        self._tick_at = float("inf")

    # --- what is so

    @property
    def may_work(self) -> bool:
        """Whether code of an active section could run at this moment."""
        return self.alive and not self.stopped

    @property
    def keeper_runs(self) -> bool:
        """Whether its keeper could kill it at this moment."""
        return self.keeper is not None and self.keeper.alive and not self.keeper.stopped

    def session_valid(self) -> bool:
        """As far as this node was told."""
        return self.ready and not self.ended and self.host.clock() < self.valid_until

    def is_held(self, now: float) -> bool:
        """Whether its section goes on by promises, whatever becomes of the session."""
        return self.hold is not None and not self.ended and self.hold.is_held(now)

    def right_until(self, now: float) -> float:
        """Until when it may have an active section."""
        return self.hold.right_until(now) if self.hold is not None else self.valid_until

    def settled_since(self) -> float:
        """How long nothing has been wrong with this node and its keeper; 0 if something is."""
        fine = (
            self.alive
            and self.may_work
            and not self.blocked
            and self.keeper_runs
            and self.session_valid()
            and not self.stopping
            and self.election.not_before < self.host.clock()
            and not self.watches.asked
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
        self.watches.begin(streams)
        take_up(self, self.world.now)

    def begin_anew(self) -> None:
        """With a session of its own."""
        streams = self.watches.streams
        self.keeper = keeper = self.host.keeper = Keeper(self, self.session, streams)
        self.world.after(PIPE, keeper.run, self.host.lock.take, keeper, self.world.now)
        self.timer(SESSION_TIMEOUT, self._no_session)

    def on_attached(self, keeper: Keeper) -> None:
        """The keeper of an earlier life holds its session for this one now."""
        self.keeper, self.session, self.is_taken_up = keeper, keeper.session, True
        self.app.adopted = [thing for thing in self.host.registered if thing.kind == PROGRAM]
        self.world.after(PIPE, keeper.run, keeper.on_streams, self.watches.streams)
        keeper.run(keeper.step)
        self.on_established()

    def on_left(self) -> None:
        """The keeper goes on alone: exit."""
        self.die("it leaves in a pause")

    def _no_session(self) -> None:
        if not self.established:
            self.world.count("sessions given up before they were there")
            self._begin_another("no session in time")
            self.die("no session in time")

    def on_established(self) -> None:
        """The session is there: look whether the list of streams is still the one it was made under."""
        self.established = True
        self.nats.call(self, None, lambda: self.nats.bucket.streams, RPC_TIMEOUT, self._confirmed)

    def _confirmed(self, streams: Any) -> None:
        if streams is UNANSWERED:
            self.nats.call(self, None, lambda: self.nats.bucket.streams, RPC_TIMEOUT, self._confirmed)
        elif streams.generation != self.watches.streams.generation and not self.ready:
            self.world.count("starts again under a new stream list")
            self.leave()
        else:
            self._claim()

    def _claim(self) -> None:
        self.nats.call(self, None, lambda: self.nats.claim(self.session), RPC_TIMEOUT, self._claimed)

    def _claimed(self, result: Any) -> None:
        if result is UNANSWERED:
            self.timer(RETRY, self._claim)
            return
        self.ready = True
        self._offer()
        self.step()

    def _offer(self) -> None:
        host = self.host
        offer = Candidate(self.session, not self.stopping, host.priority, no_failover=host.no_failover)
        if host.holds:
            offer = msgspec.structs.replace(offer, direct=host.name)
        self.nats.call(self, None, lambda: self.nats.offer(offer), RPC_TIMEOUT, self._offered)

    def _offered(self, result: Any) -> None:
        if result is UNANSWERED:
            self.timer(RETRY, self._offer)

    # --- its session

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
            self._begin_another(why)
            self.ended = True
            if self.app.section is not None and self.app.section.state != "starting":
                self.world.count("nodes that fenced themselves")
            self._fence(why)

    def _begin_another(self, why: str) -> None:
        """It is the same process that does, where nothing of it was active; else a fence may have ended
        it."""
        if self.hold is not None and self.app.section is None:
            self.host.member = self.hold.member
            self.host.start_soon(0.1)

    def _fence(self, why: str) -> None:
        things = self.app.section_things if self.app.section is not None else []
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
        if self.app.section is not None:
            moment = min(moment, next_phase_at(now, self.right_until(now), self.timing))
            if self.hold is not None:
                moment = min(moment, now + self.timing.renew_every / 2)
        if self.watches.observer is not None:
            moment = min(moment, self.watches.observer.next_check(now))
        self.tick_in(moment - now)

    def tick_in(self, delay: float) -> None:
        """Look again then at the latest."""
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
        if self.app.section is not None:
            self._watch_deadline(now)
            if not self.alive:
                return
            section = self.app.section
            if section and now >= self.right_until(now):
                self.world.fail("G1", f"{self.name} goes on in a section although its session has run out")
        if self.watches.observer is None:
            return
        if self.hold is not None:
            self._step_hold(self.hold, now)
        self.watches.bury(now)
        if self.repair.pending is not None:
            self.repair.settle()
        self.election.step(now)
        if self.stopping and self.ready and self.app.section is None:
            self._leave_if_idle()

    def _step_hold(self, hold: Hold, now: float) -> None:
        hold.step(now)
        over = self.ready and now >= self.valid_until and self.app.section is None
        if over and self.election.unreleased is None:
            self.leave()  # what outlived the session has ended

    def _watch_deadline(self, now: float) -> None:
        rules = self.world.rules
        if rules.broken == "node-ignores-deadline" or not rules.session_ends_section(
            paused=self.election.paused
        ):
            return
        match phase(now, self.right_until(now), self.timing):
            case Phase.WORK:
                away = self._disconnected_at
                if self.is_held(now):
                    return
                if away is not None and now - away > self.timing.ttl and not self.election.paused:
                    self.app.end("this node's own connection is gone")
            case Phase.STAND_DOWN:
                self.world.count("stand-downs before the deadline")
                self.app.end("the session runs out")
            case Phase.FENCE | Phase.OVER:
                self.world.count("nodes that fenced themselves")
                self._fence("its fence budget begins")

    # --- its connection

    def on_connected(self) -> None:
        """All watches were interrupted; the leader key must be verified."""
        self._disconnected_at = None
        self._connected_at = self.world.now
        if self.watches.observer is None:
            return
        self.world.count("watch restarts")
        self.election.verify = True
        self.watches.ask_all(interrupted=True)
        self.step()

    def on_disconnected(self) -> None:
        """From now on others may miss this node."""
        self._disconnected_at = self.host.clock()

    # --- stops

    def terminate(self) -> None:
        """SIGTERM: hand over, end the session, exit."""
        if self.watches.observer is None or not self.ready:
            self.die("SIGTERM before it was ready")
            return
        self.stopping = True
        self._offer()
        if self.app.is_kept and self.keeper is not None and self.session_valid():
            self.world.after(PIPE, self.keeper.run, self.keeper.away.on_leave, self)
            return
        if self.app.section is not None:
            self.app.end("SIGTERM", self.election.choose())
        else:
            self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        if self.election.unreleased is None and not self.election.is_busy:
            self.leave()

    def leave(self) -> None:
        """Nothing hangs on the session any more: let the keeper end it."""
        keeper = self.keeper
        self.ready = False
        if keeper is not None:
            self.world.after(PIPE, keeper.run, keeper.on_release)

    def resume(self) -> None:
        """On waking, a section whose successor has begun must be gone before anything else."""
        section = self.app.section
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
        section, self.app.section = self.app.section, None
        if section is not None:
            self.world.end_section(section, f"its node died ({how})")
        keeper = self.keeper
        if keeper is not None and keeper.alive:
            self.world.after(
                self.world.rng.uniform(0.0005, 0.005), keeper.run, keeper.on_node_gone, self, how
            )
        if section is not None:
            self._late_write(section.epoch)
        self.host.start_soon()

    def _late_write(self, epoch: int) -> None:
        # What a dead leader had sent may still arrive, long after: the server must refuse it by then.
        nats = self.nats
        self.world.after(self.world.rng.uniform(0.0, 3.0), lambda: nats.fenced(epoch) and None)
