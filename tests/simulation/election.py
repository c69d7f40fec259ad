"""The leader key, as one node's ``coord.election`` drives ``decide.election``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from phalanx.decide import election
from phalanx.decide.hold import Takeover
from phalanx.types import Candidate, LeaderRecord

from .nats import NOT_NOMINATED, REFUSED, RETRY, RPC_TIMEOUT, UNANSWERED, Pausing

if TYPE_CHECKING:
    from .node import Node


class Election:
    """What one node knows of the leader key, and what it does about it."""

    def __init__(self, node: Node) -> None:
        self.node, self.host, self.world, self.nats = node, node.host, node.world, node.nats
        self.timing = node.world.timing
        self.leader = LeaderRecord(0)
        self.vacant_since = node.host.clock()
        self.candidates: dict[str, Candidate] = {}
        self.not_before = float("-inf")
        self.pause: Pausing = (0, False)
        self.nomination = NOT_NOMINATED
        self.reign: int | None = None
        self.last_reign = 0
        self.unreleased: tuple[int, LeaderRecord] | None = None
        """The epoch that is to be given back, and what the key says then."""
        self.deposed = False
        self.is_busy = False
        """A request about the leader key is under way."""
        self.verify = False

    @property
    def paused(self) -> bool:
        """As far as this node was told."""
        return self.pause[1]

    def learn(self, record: LeaderRecord) -> None:
        if record.revision <= self.leader.revision:
            return
        self.leader = record
        if record.session is None:
            self.vacant_since = self.host.clock()
        else:
            self.node.watches.observer.note(record.session, self.host.clock())
            if self.node.watches.observer.is_over(record.session):
                self.vacant_since = self.host.clock()

    def _leader_over(self) -> bool:
        holder = self.leader.session
        if holder is None:
            return False
        if self.world.rules.broken == "leader-key-before-session-over" and holder != self.node.session:
            due = self.node.watches.observer.tombstones(
                self.host.clock() + 0.4 * self.timing.ttl, except_for=self.node.session
            )
            if any(t.session == holder for t in due):
                return True
        return self.node.watches.observer.is_over(holder)

    def step(self, now: float) -> None:
        if self.is_busy or self.node.conn is None or not self.node.watches.has_read_bucket:
            return
        if self.verify and self.reign is not None:
            self.is_busy = True
            self.nats.call(self.node, None, lambda: self.nats.bucket.leader, RPC_TIMEOUT, self._verified)
            return
        if self.unreleased is not None:
            self._send_release()
            return
        view = election.View(
            me=self.node.session,
            session_valid=self.node.session_valid(),
            eligible=not self.node.stopping,
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
            held=self.node.is_held(now),
            takeover=self._takeover(),
        )
        match election.next_action(view, now, self.node.watches.observer.is_over):
            case election.Acquire(expected, members):
                self._acquire(expected, members)
            case election.Begin(epoch):
                self._begin(epoch)
            case election.Deposed(reason):
                self.deposed = self.deposed or self.node.session_valid()
                self.node.app.end(reason)
            case election.Wait(until):
                self.node.tick_in(until - now)
            case election.Idle():
                pass

    def _takeover(self) -> Takeover:
        holder, hold = self.leader.session, self.node.hold
        if hold is None:
            return Takeover()
        gone = holder is None or self.node.watches.observer.ended_itself(holder)
        return hold.takeover(self.leader, gone=gone)

    def _begin(self, epoch: int) -> None:
        thing = self.node.app.to_adopt(epoch)
        adopted = thing.section.epoch if thing is not None else 0
        taken_up = self.node.is_taken_up
        if election.begins_anew(epoch, highest=0, is_taken_up=taken_up, adopted=adopted):
            self._acquire(epoch, None)
        else:
            self.node.app.begin(epoch)

    def _acquire(self, expected: int, members: int | None) -> None:
        nats, me, knew, hold = self.nats, self.node.session, self.pause, self.node.hold
        fences = self.host.has_command
        ended_itself = self.node.watches.observer.ended_itself
        unfenced = self.world.rules.to_be_fenced(me, self.leader, ended_itself, fences=fences)
        if unfenced and not fences:
            self.world.count("to be fenced by others, passed on")
        self.is_busy = True
        if hold is not None and self.leader.session is not None:
            hold.attempt(expected)
        record = LeaderRecord(0, me, unfenced=unfenced, fences=fences, hold=self.host.holds)
        nats.call(
            self.node, None, lambda: nats.lead(record, expected, knew, members=members), RPC_TIMEOUT,
            self._acquired, record,
        )  # fmt: skip

    def _acquired(self, result: Any, record: LeaderRecord) -> None:
        if result is UNANSWERED or result is REFUSED:
            self.nats.call(self.node, None, lambda: self.nats.bucket.leader, RPC_TIMEOUT, self._read_back)
            return
        self.is_busy = False
        self.learn(msgspec.structs.replace(record, revision=result))
        if self.leader.revision == result:
            self.node.app.begin(result)
        self.node.step()

    def _read_back(self, record: Any) -> None:
        if record is not UNANSWERED:
            self.learn(record)
            self.is_busy = False
            self.node.step()
        else:
            self.node.timer(RETRY, self._idle)

    def _idle(self) -> None:
        self.is_busy = False
        self.node.step()

    def _verified(self, record: Any) -> None:
        self.is_busy = False
        if record is UNANSWERED:
            self._retry()
            return
        self.verify = False
        if self.reign is not None and record.revision != self.reign:
            self.deposed = True
            self.node.app.end(f"after a reconnection the leader key is at {record.revision}")
        self.node.step()

    def _send_release(self) -> None:
        assert self.unreleased is not None
        epoch, record = self.unreleased
        nats = self.nats
        self.is_busy = True
        nats.call(
            self.node, None, lambda: nats.lead(record, epoch), RPC_TIMEOUT, self._released, epoch, record
        )

    def _released(self, result: Any, epoch: int, record: LeaderRecord) -> None:
        self.is_busy = False
        if result is UNANSWERED:
            self._retry()
        elif result is REFUSED:
            # It proves nothing: read before this is taken for done.
            self.is_busy = True
            self.nats.call(
                self.node, None, lambda: self.nats.bucket.leader, RPC_TIMEOUT, self._release_read, epoch
            )
        else:
            if record.successor is not None:
                self.world.count("hand-overs to a named successor")
            self.learn(msgspec.structs.replace(record, revision=result))
            self._release_done()

    def _release_read(self, record: Any, epoch: int) -> None:
        self.is_busy = False
        if record is not UNANSWERED:
            self.learn(record)
        if record is UNANSWERED or self.leader.revision == epoch:
            self._retry()
        else:
            self._release_done()

    def _release_done(self) -> None:
        self.unreleased = None
        if self.node.stopping:
            self.node.leave()
        self.node.step()

    def _retry(self) -> None:
        self.is_busy = True
        self.node.timer(RETRY, self._idle)

    def learn_pause(self, pause: Pausing) -> None:
        if pause[0] <= self.pause[0]:
            return
        before, self.pause = self.paused, pause
        self.node.app.tell_keep()
        if before and not self.paused:
            self.vacant_since = max(self.vacant_since, self.host.clock())
            if self.node.app.held:
                self.node.app.end(self.node.app.held)
                self.node.app.held = ""

    def choose(self) -> str | None:
        nomination = self.nomination[1]
        offer = self.candidates.get(nomination.node)
        if (
            nomination.epoch == self.leader.revision
            and offer is not None
            and offer.eligible
            and offer.session != self.node.session
            and not self.node.watches.observer.is_over(offer.session)
        ):
            return nomination.node
        return self.world.rules.choose(
            self.node.session, self.candidates.values(), self.node.watches.observer.is_over
        )
