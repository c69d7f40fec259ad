"""What one node sees: the session streams and the bucket, by watches and catch-ups, as ``coord.register``."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from phalanx.decide.session import SessionBody, StreamList, Tombstone
from phalanx.types import SessionId

from .host import PIPE
from .nats import REFUSED, RPC_TIMEOUT, UNANSWERED

if TYPE_CHECKING:
    from .node import Node

_revision = operator.itemgetter(0)


class Watches:
    """Drives the node's Observer, and tells its election what the bucket says."""

    def __init__(self, node: Node) -> None:
        self.node, self.host, self.world, self.nats = node, node.host, node.world, node.nats
        self.timing = node.world.timing
        self.streams: StreamList
        """As the session was made under."""
        self.observer: Any = None
        """None until the list of streams was read."""
        self.has_read_bucket = False
        self.asked: dict[str, bool] = {}
        """Catch-ups under way, and whether the watch was interrupted before."""
        self.caught_up: dict[str, float] = {}
        self._revisions: dict[tuple[str, SessionId], int] = {}
        self._burying: set[tuple[str, SessionId]] = set()

    def begin(self, streams: StreamList) -> None:
        """Observe from now on, with this list of session streams."""
        self.streams = streams
        self.observer = self.world.rules.observer(streams, self.timing, self.host.clock())
        self.ask_all(interrupted=True)

    def ask_all(self, *, interrupted: bool) -> None:
        """Read the state of every stream and of the bucket."""
        for name in self.observer.streams.all_streams:
            self.ask(name, interrupted=interrupted)
        self.ask("bucket", interrupted=interrupted)

    # --- tombstones

    def bury(self, now: float) -> None:
        """End the sessions of others that are due."""
        for tombstone in self.observer.tombstones(now, except_for=self.node.session):
            key = (tombstone.stream, tombstone.session)
            if key not in self._burying:
                self._burying.add(key)
                self._send_tombstone(tombstone)

    def _send_tombstone(self, tombstone: Tombstone) -> None:
        nats, stream, session = self.nats, tombstone.stream, tombstone.session
        self.world.count("tombstones by observers")
        self.world.log(self.node.name, f"buries {session} in {stream} at {tombstone.revision}")
        body = SessionBody(self.observer.streams.generation, True, "expired", self.node.name)
        expect = None if self.world.rules.no_cas else tombstone.revision
        nats.call(
            self.node,
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
            self.node.timer(self.timing.renew_every, self._burying.discard, (stream, session))
            return
        self._burying.discard((stream, session))
        self._tell(self.observer.on_record(stream, session, result, body, self.host.clock()))

    def _tell(self, over: list[SessionId]) -> None:
        for session in over:
            self.world.session_over(session, self.node.name)
            if self.node.election.leader.session == session:
                self.node.election.vacant_since = self.host.clock()
        if over:
            self.node.step()

    # --- watches

    def watched(self, conn: Any, channel: str, handler: str, args: tuple[Any, ...]) -> None:
        """A republished message comes in over the connection it was sent on."""
        if conn is None or conn == self.node.conn:
            self.node.run(getattr(self, handler), channel, *args)

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
            if before > self.node.election.leader.revision:
                self.ask("bucket", interrupted=True)
            self.node.election.learn(value)
        elif what == "offer":
            self.node.election.candidates[value.session.node] = value
        elif what == "pause":
            self.node.election.learn_pause(value)
        elif what == "fenced":
            self.node.app.on_fenced(value)
        elif what == "nomination":
            self.node.election.nomination = max(self.node.election.nomination, value, key=_revision)
        elif what == "members":
            if self.node.hold is not None:
                self.node.hold.learn(*value)
        else:
            self.use_streams(value)
        self.node.step()

    def ask(self, channel: str, *, interrupted: bool) -> None:
        """Read the whole state of a stream, until that works."""
        if channel in self.asked:
            self.asked[channel] = self.asked[channel] or interrupted
            return
        self.asked[channel] = interrupted
        self._catch_up(channel)

    def _catch_up(self, channel: str) -> None:
        asked_at = self.host.clock()
        interrupted, self.asked[channel] = self.asked[channel], False
        nats = self.nats
        if channel == "bucket":
            nats.call(self.node, None, nats.bucket_state, RPC_TIMEOUT, self._bucket_state)
        else:
            nats.call(
                self.node,
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
            del self.asked[channel]
            return
        if keys is UNANSWERED:
            self.asked[channel] = interrupted or self.asked[channel]
            self.node.timer(0.1, self._catch_up, channel)
            return
        again = self.asked.pop(channel)
        for session, (revision, _) in keys.items():
            self._revisions[channel, session] = revision
        over = self.observer.on_catch_up(
            channel, keys, self.host.clock(), interrupted=interrupted, asked_at=asked_at
        )
        self.caught_up[channel] = asked_at
        self._tell(over)
        if again and self.node.alive:
            self.ask(channel, interrupted=True)

    def _bucket_state(self, state: Any) -> None:
        if state is UNANSWERED:
            self.node.timer(0.1, self._catch_up, "bucket")
            return
        again = self.asked.pop("bucket")
        leader, offers, streams, pause, nomination, members = state
        self.node.election.learn(leader)
        self.node.election.learn_pause(pause)
        self.node.election.nomination = max(self.node.election.nomination, nomination, key=_revision)
        if self.node.hold is not None:
            self.node.hold.learn(*members)
        self.has_read_bucket = True
        for offer in offers:
            self.node.election.candidates.setdefault(offer.session.node, offer)
        self.use_streams(streams)
        if again:
            self.ask("bucket", interrupted=True)
        self.node.step()

    def resync(self) -> None:
        """What a watch does now and then, to be sure."""
        if self.observer is not None:
            self.ask_all(interrupted=False)

    def use_streams(self, streams: StreamList) -> None:
        """Follow a new list of session streams."""
        if streams.generation <= self.observer.streams.generation:
            return
        new = set(streams.all_streams) - set(self.observer.streams.all_streams)
        self._tell(self.observer.on_streams(streams, self.host.clock()))
        for name in sorted(new):
            self.ask(name, interrupted=True)
        keeper = self.node.keeper
        if keeper is not None:  # after the observer: who sees the new list used may trust that it is watched
            self.world.after(PIPE, keeper.run, keeper.on_streams, streams)
