"""The keeper, as ``phalanx.keeper.process`` has it: renews, watches its node, kills first, then releases."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from phalanx.decide.keeper import Watchdog
from phalanx.decide.session import Renewal, SessionBody, StreamList
from phalanx.types import SessionId

from .away import Away
from .host import PIPE, Process
from .nats import REFUSED, UNANSWERED
from .world import Section

if TYPE_CHECKING:
    from .node import Node
    from .things import Thing, Warden


class Keeper(Process):
    """Drives a Holder and a Watchdog just as ``keeper/process.py`` and ``keeper/renewing.py`` do."""

    kind = "keeper"

    def __init__(self, node: Node, session: SessionId, streams: StreamList) -> None:
        super().__init__(node.host)
        self.node, self.session = node, session
        timing = self.timing = self.world.timing
        self.holder = self.world.rules.holder(session, streams, timing)
        self.watchdog = Watchdog(timing, self.host.clock(), self.world.away_seconds)
        self.registered: list[Section] = []
        self.timeout = max(0.2, min(1.0, timing.ttl / 5))
        self.established = False
        self.ending = self.begun = False
        self.away = Away(self)
        self.warden: Warden | None = None
        self.vouched = False
        """It has seen that nothing is left of what was registered."""
        self._extended = float("-inf")
        """Until when what is registered may go on without the session."""
        self._told = float("-inf")
        self._next_tick = 0.0
        self._wake_at = float("inf")
        self._gone: str | None = None
        self._release_asked = False
        self._reading: set[str] = set()
        self._requests = 0

    # --- what is so

    def holds_now(self) -> bool:
        """Whether it counts its session as valid at this moment, as far as it has come to look."""
        if self.ending or not self.established:
            return False
        holder = self.holder
        return not holder.is_ended and not holder.is_expired and self.host.clock() < holder.valid_until

    @property
    def ends_at(self) -> float:
        """When nothing of its node may run any more."""
        return max(self.holder.valid_until, self._extended)

    @property
    def is_alone(self) -> bool:
        """Whether it holds its session without a node, and could act."""
        return self.watchdog.is_away and self.alive and not self.stopped and not self.ending

    # --- the loop

    def step(self) -> None:
        """One round of ``Keeper._hold``."""
        if not self.begun:
            return
        if self.ending or self.away.is_busy:
            if not self.vouched:
                self._renew_meanwhile()
            return
        holder, now, timing = self.holder, self.host.clock(), self.timing
        if now >= self._next_tick:
            self._tick(now)
            self._next_tick = now + timing.renew_every
        elif holder.reads():
            self._read_back()
        valid = holder.is_valid(now)
        if valid:
            self.world.session_held(self.session)
            if not self.established:
                self.established = True
                self._say("on_established")
            if holder.valid_until > self._told:
                self._told = holder.valid_until
                self._say("on_valid_until", self._told)
        if self._release_asked:
            self._end("the node says so", kill=False)
            return
        if self._gone is not None:
            self.watchdog.on_gone(self._gone)
        held = bool(self.registered) and now < self._extended
        if self.established and not valid and not held:
            self._say("on_lost", "ended by others" if holder.is_ended else "no majority in time")
            self.world.count("sessions lost by their keeper")
            self._end("session lost", kill=bool(self.registered))
            return
        valid_until = self.ends_at if self.established else now + timing.ttl
        verdict = self.watchdog.verdict(
            now,
            valid_until,
            has_resources=bool(self.registered or (self.world.adoptable and self.host.registered)),
            keeps=self.established and self.away.keeps,
        )
        if verdict is not None and verdict.keep:
            self.away.begin(verdict)
            return
        if (
            verdict is not None
            and self.world.rules.broken == "node-ignores-deadline"
            and not verdict.kill_node
        ):
            verdict = None
        if verdict is not None:
            self.world.count("fencings by the keeper")
            self.world.log(self.name, f"fences: {verdict.reason}")
            self._end(verdict.reason, kill=verdict.kill_node or bool(self.registered))
            return
        ends = self._told if valid else self._next_tick
        self._wake(min(self._next_tick, self.watchdog.next_check(valid_until), ends), now)

    def _wake(self, moment: float, now: float) -> None:
        at = self.world.now + max(0.001, moment - now) / self.host.rate
        if at < self._wake_at - 1e-9:
            self._wake_at = at
            self.world.at(at, self.run, self._woken, at)

    def _woken(self, at: float) -> None:
        if at >= self._wake_at - 1e-9:
            self._wake_at = float("inf")
            self.step()

    def _tick(self, now: float) -> None:
        if self.conn is None:
            return
        for renewal in self.holder.renewals(now):
            self._renew(renewal, now)
        self._read_back()

    def _renew(self, renewal: Renewal, now: float) -> None:
        body = SessionBody(generation=self.holder.streams.generation)
        stream, session, revision, nats = renewal.stream, self.session, renewal.revision, self.nats
        nats.call(
            self, stream, lambda: nats.put(stream, session, body, revision), self.timeout,
            self._renewed, stream, now,
        )  # fmt: skip

    def _renewed(self, result: Any, stream: str, sent_at: float) -> None:
        if self.vouched:
            return
        if result is UNANSWERED:
            self.holder.on_unanswered(stream)
        elif result is REFUSED:
            self.holder.on_refused(stream)
        else:
            if self.world.rules.broken == "keeper-deadline-from-reply":
                self.holder.reply_at = self.host.clock()  # type: ignore[attr-defined]
            self.holder.on_ack(stream, sent_at, result)
        self.step()

    def _read_back(self) -> None:
        nats, session = self.nats, self.session
        for stream in self.holder.reads():
            if stream not in self._reading:
                self._reading.add(stream)
                nats.call(
                    self, stream, lambda s=stream: nats.get(s, session), self.timeout, self._read, stream
                )

    def _read(self, result: Any, stream: str) -> None:
        self._reading.discard(stream)
        if self.ending:
            return
        if result is not UNANSWERED:
            revision, body = result if result is not None else (0, None)
            self.holder.on_read(stream, revision, body, self.host.clock())
        # Unanswered: asked again at the next tick, so that a dead server is not hammered.
        if result is not UNANSWERED:
            self.step()

    # --- in a pause

    def forget_node(self) -> None:
        """What it says or does from now on means nothing."""
        self._gone = None

    def take_node(self, node: Node) -> None:
        """There is a node again."""
        self.node, self._gone, self._told = node, None, float("-inf")
        self.watchdog.on_back(self.host.clock())

    def end(self, reason: str) -> None:
        """End everything, without a node."""
        self._end(reason, kill=False)

    # --- the end: kill first, release then

    def _end(self, reason: str, *, kill: bool) -> None:
        self.ending, self.away.has_door = True, False
        if self.world.rules.broken == "release-before-kill" and kill:
            self.timer(0.2, self._kill, reason)
            self._all_gone()
            return
        if kill:
            self._kill(reason)
        if self.world.rules.broken == "released-while-its-program-runs":
            self._all_gone()
            return
        from .things import Ending

        Ending(list(self.host.registered), self, self._all_gone).step()

    def _renew_meanwhile(self) -> None:
        # What does not die yet must not run without a session, if it can be held.
        now = self.host.clock()
        if now >= self._next_tick:
            self._tick(now)
            self._next_tick = now + self.timing.renew_every
            self._wake(self._next_tick, now)

    def _all_gone(self) -> None:
        self.vouched = True
        self.registered.clear()
        self.host.registered.clear()
        if self.host.noted is self:
            self.host.noted = None
        if self.warden is not None:
            self.warden.alive = False
        self._release_until = self.host.clock() + 2 * self.timing.ttl
        self._buried: set[str] = set()
        self._revisions = {n: self.holder.revisions().get(n, 0) for n in self.holder.streams.all_streams}
        self._release()

    def _kill(self, reason: str) -> None:
        if self.node.alive:
            if self.node.app.section is not None:
                self.world.count("nodes killed by their keeper in an active section")
            self.node.die(f"killed by its keeper: {reason}")

    def _release(self) -> None:
        if self.host.clock() >= self._release_until:
            self.die("could not release")
            return
        missing = [name for name in self._revisions if name not in self._buried]
        self._requests = len(missing)
        generation, nats = self.holder.streams.generation, self.nats
        body = SessionBody(generation, True, "released", self.name, released=True)
        for stream in missing:
            revision = self._revisions[stream]
            nats.call(
                self, stream, lambda s=stream, r=revision: nats.put(s, self.session, body, r), self.timeout,
                self._bury_answer, stream,
            )  # fmt: skip

    def _bury_answer(self, result: Any, stream: str) -> None:
        if result is REFUSED:
            self.nats.call(
                self,
                stream,
                lambda: self.nats.get(stream, self.session),
                self.timeout,
                self._bury_read,
                stream,
            )
            return
        if result is not UNANSWERED:
            self._buried.add(stream)
        self._bury_done()

    def _bury_read(self, result: Any, stream: str) -> None:
        if result is not UNANSWERED:
            if result is not None and result[1].tombstone:
                self._buried.add(stream)
            self._revisions[stream] = result[0] if result is not None else 0
        self._bury_done()

    def _bury_done(self) -> None:
        self._requests -= 1
        if self.holder.streams.has_majority(self._buried):
            self.world.session_over(self.session, self.name)
            self._say("on_released")
            self.die("its session is released")
        elif self._requests == 0:
            self.timer(0.05, self._release)

    # --- node and keeper

    def _say(self, what: str, *args: Any) -> None:
        self.world.after(PIPE, self._tell, what, args)

    def _tell(self, what: str, args: tuple[Any, ...]) -> None:
        if self.node.keeper is self:
            self.node.run(operator.attrgetter(what)(self.node), *args)

    def on_beat(self) -> None:
        """Any message of the node."""
        self.watchdog.on_beat(self.host.clock())

    def on_register(self, section: Section) -> None:
        """The node is about to start this."""
        self.on_beat()
        if not self.ending:
            self.registered.append(section)
            self._say("app.on_registered", section)

    def on_extend(self, until: float) -> None:
        """The node has promises that reach so far."""
        self.on_beat()
        self._extended = max(self._extended, until)
        self.step()

    def on_unregister(self, section: Section) -> None:
        """It has ended."""
        self.on_beat()
        if section in self.registered:
            self.registered.remove(section)

    def start_warden(self) -> None:
        """Beside it from before it begins, and again when it has died."""
        from .things import Warden

        self.warden = Warden(self)

    def begin(self) -> None:
        """Nothing of an earlier life is left."""
        self.host.registered.clear()
        self.begun = True
        if self._gone is not None:
            self.vouched = True
            self.die("its node has ended")
            return
        self.watchdog.on_beat(self.host.clock())
        self.connect()
        self.step()

    def on_register_thing(self, thing: Thing) -> None:
        """The same, of a program or an address: in a file too."""
        self.on_beat()
        if not self.ending:
            self.host.registered.append(thing)
            self._say("app.on_thing_registered", thing)

    def on_unregister_thing(self, thing: Thing) -> None:
        """It has ended."""
        if thing in self.host.registered:
            self.host.registered.remove(thing)

    def on_release(self) -> None:
        """The node wants the session ended."""
        self._release_asked = True
        self.step()

    def on_streams(self, streams: StreamList) -> None:
        """The list of session streams changed."""
        self.on_beat()
        if not self.ending:
            self.holder.is_valid(self.host.clock())
            self.holder.on_streams(streams)
            self.step()

    def on_node_gone(self, node: Node, how: str) -> None:
        """The socket closed, or the process ended."""
        if node is self.node and not self.watchdog.is_away:
            self._gone = how
            self.step()

    def on_connected(self) -> None:
        """Send at once what is due."""
        self._next_tick = min(self._next_tick, self.host.clock())
        self.step()

    def on_death(self, how: str) -> None:
        """The node and the warden see their channels close."""
        warden = self.warden
        if warden is not None and not self.vouched:
            self.world.after(self.world.rng.uniform(0.0005, 0.003), warden.run, warden.on_keeper_died)
        if self.node.alive and self.node.keeper is self:
            self.world.after(PIPE, self.node.run, self.node.on_keeper_gone)
