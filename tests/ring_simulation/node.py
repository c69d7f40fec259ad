"""A node: its session with its keeper, what it has heard, its part in planning, its partitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phalanx.decide.ring_ownership import Action, Begin, End, Ownership, Read, Write
from phalanx.decide.ring_plan import Planner, Propose, RingMember, RingPlan, Wait, wanted
from phalanx.types import SessionId

from .breaks import OWNERSHIPS, PLANNERS
from .world import PLAN, REFUSED, UNANSWERED, Acting, Session, World

MEMBER = 1000
"""The key of the first host's offer; the others follow."""

HOLD, GRACE, FENCE = 1.9, 0.6, 0.3
RENEW_EVERY, RPC_TIMEOUT, RETRY, RESYNC_EVERY = 0.2, 0.5, 0.1, 1.0


class Node:
    """One life of a node on one host."""

    def __init__(self, world: World, host: int, life: int, weight: int) -> None:
        self.world, self.host, self.life, self.weight = world, host, life, weight
        self.name = f"n{host}"
        self.session = Session(SessionId(self.name, str(life)))
        self.alive = self.keeper_runs = True
        self.frozen = self.host_frozen = self.cut_off = False
        self.ready, self.leaving = True, False
        self.valid_until = -1.0
        self._waiting: list[Callable[[], None]] = []
        """What has happened while it stood still."""
        self._lag_until = 0.0
        self._over: set[SessionId] = set()
        self._members: dict[str, RingMember] = {}
        self._member_revisions: dict[int, int] = {}
        self._acting: dict[int, Acting] = {}
        self._proposing = self._offering = False
        self._offered: RingMember | None = None
        self._timer_at = float("inf")
        self.own = OWNERSHIPS.get(world.broken, Ownership)(self.session.id, world.partitions, self._is_over)
        self.planner = PLANNERS.get(world.broken, Planner)(
            self.name, world.partitions, settle_seconds=world.settle_seconds
        )
        self._renew()
        self._resync()
        for session in world.sessions.values():
            if session.over:
                self._over.add(session.id)
        world.sessions[self.session.id] = self.session

    # --- what is so

    @property
    def can_work(self) -> bool:
        """Whether its code could run at this moment."""
        return self.alive and not self.frozen

    @property
    def is_member(self) -> bool:
        """Whether it should own its share."""
        return self.can_work and self.ready and not self.leaving

    def _is_over(self, session: SessionId) -> bool:
        return self.world.broken == "taken-from-the-living" or session in self._over

    def _offer(self) -> RingMember:
        return RingMember(self.session.id, self.weight, self.ready and not self.leaving)

    # --- its life

    def do(self, call: Callable[[], None]) -> None:
        """Its code runs: now, or when it stands still no more."""
        if not self.alive:
            return
        if self.frozen:
            self._waiting.append(call)
            return
        call()

    def _and_look(self, call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            call()
            self.step()

        return run

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """A timer."""
        self.world.after(seconds, self.do, call)

    def die(self, how: str) -> None:
        """Its code runs no more, and its keeper, if there is one, says so."""
        if not self.alive:
            return
        self.alive = False
        self.world.log(self.name, f"dies: {how}")
        for acting in list(self._acting.values()):
            self.world.end(acting, "its node has died")
            self._late_write(acting)
        if self.keeper_runs and not self.host_frozen:
            self.world.after(self.world.rng.uniform(0.001, 0.02), self._tombstone)

    def _late_write(self, acting: Acting) -> None:
        self.world.after(
            self.world.rng.uniform(0, 2),
            lambda: self.world.fenced_write(acting.partition, acting.epoch),
        )

    def _tombstone(self) -> None:
        if not self.host_frozen and not self.cut_off and self.keeper_runs:
            self.world.count("sessions ended by their keeper")
            self.world.end_session(self.session)

    def freeze(self, seconds: float, *, host: bool) -> None:
        """SIGSTOP of the node, or the whole host stands still."""
        if not self.alive or self.frozen:
            return
        self.frozen, self.host_frozen = True, host
        self.world.log(self.name, f"stands still for {seconds:.2f} s{' with its host' if host else ''}")
        self.world.after(seconds, self._thaw)
        if not host:
            self.world.after(0.8, self._stalled)

    def _stalled(self) -> None:
        if self.alive and self.frozen and not self.host_frozen:
            if self.world.broken == "keeper-late":
                self.world.after(0.3, self.die, "killed too late")
                self.world.end_session(self.session)
            else:
                self.die("its keeper kills it: it stands still")

    def _thaw(self) -> None:
        if not self.alive or not self.frozen:
            return
        self.frozen = self.host_frozen = False
        self.world.log(self.name, "goes on")
        if self.world.now >= self.valid_until - FENCE / 2 and self.world.broken != "acts-without-a-session":
            self.die("killed on waking: its session has run out")
            return
        for acting in self._acting.values():
            if acting.excused:
                self.world.fail("G6", f"{self.session.id} woke up and goes on with {acting.partition}")
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            self.do(call)
        self.do(self.step)

    def terminate(self) -> None:
        """SIGTERM: give everything back, end the session, exit."""
        if self.leaving:
            return
        self.leaving = True
        self.world.log(self.name, "is to stop")
        self.do(self._leave)

    def _leave(self) -> None:
        self.own.leave()
        self.world.after(4.0, self.die, "its service manager has lost patience")
        self.step()

    def _leave_if_clear(self) -> None:
        if not self.leaving or not (self.own.is_clear or self.world.broken == "leaves-with-partitions"):
            return
        self.world.count("graceful ends")
        self.valid_until = -1.0
        self.keeper_runs = False
        if self.world.broken == "leaves-with-partitions":
            self.world.after(0.3, self.die, "stopped")
        else:
            self.die("stopped")
        self.world.end_session(self.session)

    # --- its session

    def _renew(self) -> None:
        if not self.keeper_runs or not self.alive:
            return
        if not self.host_frozen:
            self._guard()
            if self.session.over or 0 < self.valid_until <= self.world.now:
                self.die("its session is over: it begins anew")
                return
            sent_at = self.world.now
            if not self.cut_off and not (self.valid_until != -1.0 and sent_at >= self.valid_until):
                self.world.renew(self.session, sent_at)
                self.valid_until = sent_at + HOLD
                self.do(self.step)
        self.world.after(RENEW_EVERY, self._renew)

    def _guard(self) -> None:
        """The keeper's: what still runs when the session ends is killed."""
        left = self.valid_until - self.world.now
        if self.valid_until != -1.0 and left < FENCE / 2 and self._acting:
            if self.world.broken != "acts-without-a-session":
                self.world.count("nodes killed by their keeper at the deadline")
                self.die("its keeper kills it: its session runs out")
        elif FENCE / 2 < left <= FENCE / 2 + RENEW_EVERY:
            self.world.after(left - FENCE / 2 + 0.001, self._guard_once)

    def _guard_once(self) -> None:
        if self.alive and not self.host_frozen and self.keeper_runs:
            self._guard()

    # --- messages

    def hear(self, call: Callable[[], None]) -> None:
        """A republished message is on its way to this node; it may be late, or get lost."""
        if self.cut_off or self.world.chance(0.01):
            self.world.count("messages lost")
            return
        lag = max(0.0, self._lag_until - self.world.now)
        self.later(self.world.rng.uniform(0.0003, 0.006) + lag, self._and_look(call))

    def lag(self, seconds: float) -> None:
        """What it hears comes late for a while."""
        self._lag_until = self.world.now + seconds

    def call(self, act: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """A request to the stream's leader: it or its answer may get lost."""
        world, rng = self.world, self.world.rng
        answered = [False]

        def finish(result: Any) -> None:
            if not answered[0]:
                answered[0] = True
                done(result)

        def arrive() -> None:
            if world.now < world.unavailable_until or self.cut_off or world.chance(world.loss):
                return
            result = act()
            if world.chance(world.loss):
                world.count("lost replies")
            elif not self.cut_off:
                self.later(rng.uniform(0.0002, 0.003), lambda: finish(result))

        late = rng.choice((0.01, 0.05, 0.1, 0.5, 1.5)) if world.chance(2 * world.loss) else 0.0
        world.after(rng.uniform(0.0002, 0.003) + late, arrive)
        self.later(RPC_TIMEOUT, lambda: finish(UNANSWERED))

    def _resync(self) -> None:
        """The watch's catch-up: the state of the bucket, as a replica has it."""
        if not self.alive:
            return

        def read() -> None:
            if not self.cut_off and not self.frozen:
                for key, (revision, value) in list(self.world.bucket.items()):
                    self.on_record(key, revision, value)
                for session in self.world.sessions.values():
                    if session.over:
                        self.on_session_over(session.id)
                self.step()

        self.do(read)
        self.world.after(RESYNC_EVERY * self.world.rng.uniform(0.8, 1.2), self._resync)

    def reconnected(self) -> None:
        """NATS is back: what it holds is looked at again."""
        self.cut_off = False
        self.do(self._and_look(lambda: self.own.on_reconnected()))

    # --- what it hears

    def on_record(self, key: int, revision: int, value: Any) -> None:
        """A key of the bucket."""
        if key == PLAN:
            self._on_plan(revision, value)
        elif key >= MEMBER:
            if revision > self._member_revisions.get(key, 0):
                self._member_revisions[key] = revision
                self._members[f"n{key - MEMBER}"] = value
                if key == MEMBER + self.host and value != self._offer():
                    # What was sent long ago, or by an earlier life, may have arrived after all: say it again.
                    self._offered = None
        else:
            self.own.on_record(key, revision, value)

    def on_session_over(self, session: SessionId) -> None:
        """For good."""
        if session not in self._over:
            self._over.add(session)
            self.own.on_session_over(session)

    def _on_plan(self, revision: int, found: RingPlan | None) -> None:
        before = self.planner.revision
        self.planner.on_plan(revision, found, self.world.now)
        if found is not None and self.planner.revision != before:
            self.own.on_plan(found.owner_names())

    # --- what it does

    def step(self) -> None:
        """Everything that is due."""
        if not self.can_work:
            return
        world = self.world
        valid = not self.session.over and world.now < self.valid_until
        may_begin = world.now < self.valid_until - GRACE - FENCE
        if world.broken == "acts-without-a-session":
            valid = may_begin = True
        for action in self.own.step(valid=valid, may_begin=may_begin):
            self._act(action)
        if not self.can_work:
            return
        if valid:
            self._tell_offer()
            self._plan()
            self._timer(
                max(self.valid_until - GRACE - FENCE, world.now + 0.0005) if may_begin else self.valid_until
            )
        self._leave_if_clear()

    def _timer(self, at: float) -> None:
        """Look again then."""
        if at < self._timer_at and at != float("inf"):
            self._timer_at = at
            self.later(max(0.0, at - self.world.now) + 1e-6, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_at = float("inf")
        self.step()

    def _tell_offer(self) -> None:
        offer = self._offer()
        if offer == self._offered or self._offering:
            return
        self._offering, self._offered = True, None

        def done(result: Any) -> None:
            self._offering = False
            if result is not UNANSWERED and result is not REFUSED:
                key = MEMBER + self.host
                self._offered = offer if result >= self._member_revisions.get(key, 0) else None
                self.on_record(key, result, offer)
            self.step()

        self.call(lambda: self.world.store(MEMBER + self.host, offer, None), done)

    def _plan(self) -> None:
        over: Callable[[SessionId], bool] = self._over.__contains__
        if self.world.broken == "dead-stay-planned":
            over = lambda session: False  # noqa: E731
        self.planner.on_members(wanted(self._members, over), self.world.now)
        action = None if self._proposing else self.planner.next_action(self.world.now)
        if isinstance(action, Wait):
            self._timer(action.until)
        elif isinstance(action, Propose):
            self._proposing = True
            self.call(
                lambda: self.world.store(PLAN, action.plan, action.expected_revision), self._proposed(action)
            )

    def _proposed(self, action: Propose) -> Callable[[Any], None]:
        def done(result: Any) -> None:
            if result is UNANSWERED or result is REFUSED:
                self.later(RETRY if result is UNANSWERED else 0.0, self._read_plan)
            else:
                self._proposing = False
                self._on_plan(result, action.plan)
                self.step()

        return done

    def _read_plan(self) -> None:
        def done(result: Any) -> None:
            self._proposing = False
            if result is not UNANSWERED:
                self._on_plan(*result)
            self.step()

        self.call(lambda: self.world.bucket.get(PLAN, (0, None)), done)

    def _act(self, action: Action) -> None:
        match action:
            case Write():
                self._write(action)
            case Read(partition):
                self._read(partition)
            case Begin(partition, epoch):
                self._begin(partition, epoch)
            case End():
                self._end(action)

    def _write(self, action: Write) -> None:
        number, world = action.partition, self.world
        blind = world.broken == "no-compare-and-set" or (world.broken == "blind-release" and not action.take)
        value = self.session.id if action.take else None

        def done(result: Any) -> None:
            if result is UNANSWERED:
                self.later(RETRY, self._and_look(lambda: self.own.on_not_written(number)))
                return
            if result is REFUSED:
                self.own.on_not_written(number)
            else:
                self.own.on_written(number, result, take=action.take)
            self.step()

        self.call(lambda: world.store(number, value, None if blind else action.expected_revision), done)

    def _read(self, number: int) -> None:
        def done(result: Any) -> None:
            if result is UNANSWERED:
                self.later(RETRY, self._and_look(lambda: self.own.on_not_read(number)))
                return
            self.own.on_read(number, *result)
            self.step()

        self.call(lambda: self.world.bucket.get(number, (0, None)), done)

    # --- its partitions

    def _begin(self, number: int, epoch: int) -> None:
        acting = Acting(self, number, epoch)
        self._acting[number] = acting
        self.world.begin(acting)
        rng = self.world.rng
        takes = rng.choice((0.0, 0.0, 0.01, 0.05, 0.2))
        if self.world.chance(0.01):
            self.world.count("hooks that failed")
            self.later(takes, lambda: self._failed(acting))
        else:
            self.later(takes, lambda: self._owned(acting))

    def _owned(self, acting: Acting) -> None:
        if self._acting.get(acting.partition) is acting and not acting.ending:
            acting.ready = True
            self._write_fenced(acting)

    def _write_fenced(self, acting: Acting) -> None:
        if self._acting.get(acting.partition) is acting and not self.world.calm:
            self.call(lambda: self.world.fenced_write(acting.partition, acting.epoch), lambda result: None)
            self.later(self.world.rng.uniform(0.2, 1.0), lambda: self._write_fenced(acting))

    def _failed(self, acting: Acting) -> None:
        if self._acting.get(acting.partition) is acting:
            self.own.set_aside(acting.partition, True)
            self.later(0.3, self._and_look(lambda: self.own.set_aside(acting.partition, False)))
            self.step()

    def _end(self, action: End) -> None:
        acting = self._acting[action.partition]
        acting.ending = action.reason
        rng = self.world.rng
        self.world.log(
            self.name, f"ends {action.partition}{' at once' if action.hard else ''}: {action.reason}"
        )
        takes = rng.choice((0.0, 0.001, 0.02)) if action.hard else rng.choice((0.0, 0.01, 0.05, 0.3))
        if self.world.chance(0.01):
            self.world.count("hooks that were deaf")
            takes = 3.0
        if self.world.broken == "released-before-its-end":
            del self._acting[action.partition]
            self.later(takes, lambda: self.world.end(acting, action.reason))
            self.own.on_ended(action.partition)
            self.later(0.0, self.step)
        else:
            self.later(takes, lambda: self._ended(acting, action.reason))

    def _ended(self, acting: Acting, how: str) -> None:
        if self._acting.get(acting.partition) is acting:
            del self._acting[acting.partition]
            self.world.end(acting, how)
            self.own.on_ended(acting.partition)
            self.step()
