"""A modelled NATS: three servers, session streams with one replica, an app bucket with three.

What it does on purpose: delays, lost requests, lost replies (the write is stored, no answer comes),
requests that arrive long after their sender gave up, spurious refusals of compare-and-set, watches that
lag or miss messages, servers that come back without their last writes, and a bucket that takes no write
while it elects a leader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from phalanx.decide.hold import MemberList
from phalanx.decide.session import SessionBody, StreamList
from phalanx.types import Candidate, FenceNote, LeaderRecord, Nomination, SessionId

if TYPE_CHECKING:
    from .host import Process
    from .world import World

UNANSWERED: Any = "unanswered"
REFUSED: Any = "refused"

RPC_TIMEOUT = 1.0
RETRY = 0.1
"""Between a node's attempts at something."""

Pausing = tuple[int, bool]
"""The revision of the app's pause key, and whether it is paused."""

Nominating = tuple[int, Nomination]
"""The revision of the nomination key, and what it says."""

NOT_NOMINATED: Nominating = (0, Nomination(0, ""))


class SessionStream:
    """A stream with one replica. ``log`` lets its server lose its last writes."""

    __slots__ = ("keys", "log", "name", "seq", "server")

    def __init__(self, name: str, server: int) -> None:
        self.name, self.server, self.seq = name, server, 0
        self.keys: dict[SessionId, tuple[int, SessionBody]] = {}
        self.log: list[tuple[float, SessionId, tuple[int, SessionBody] | None]] = []

    def lose(self, since: float) -> int:
        """Forget what was written since that moment; returns how many writes that were."""
        lost = 0
        while self.log and self.log[-1][0] >= since:
            _, session, before = self.log.pop()
            if before is None:
                del self.keys[session]
            else:
                self.keys[session] = before
            lost += 1
        self.seq -= lost
        return lost

    def wipe(self) -> None:
        """The server comes back with nothing."""
        self.keys.clear()
        self.log.clear()
        self.seq = 0


class Bucket:
    """What a majority of servers holds: leader key, offers, the list of session streams."""

    __slots__ = (
        "history",
        "living",
        "members",
        "named",
        "nomination",
        "notes",
        "offers",
        "on_server",
        "pause",
        "ready_at",
        "seq",
        "streams",
    )

    def __init__(self, streams: StreamList) -> None:
        self.seq = 0
        self.history = [LeaderRecord(0)]
        self.offers: dict[str, Candidate] = {}
        self.living: dict[str, SessionId] = {}
        """The member keys: under which session each node lives, or did last."""
        self.notes: dict[str, FenceNote] = {}
        """By node: the last of its sessions that somebody has fenced, or has seen to be off."""
        self.streams = streams
        self.pause: Pausing = (0, False)
        self.nomination = NOT_NOMINATED
        self.named: set[Nomination] = set()
        """All that operators ever wrote."""
        self.members: tuple[int, MemberList | None] = (0, None)
        """Revision and content of the list of who may follow a session that is over."""
        self.on_server = 0
        self.ready_at = 0.0

    @property
    def leader(self) -> LeaderRecord:
        """The leader key."""
        return self.history[-1]


class Server:
    """One server. ``life`` grows with each start: connections belong to one life."""

    __slots__ = ("index", "life", "up")

    def __init__(self, index: int) -> None:
        self.index, self.up, self.life = index, True, 0


class Nats:
    """The servers, the links, and every request."""

    def __init__(self, world: World, hosts: int, streams: StreamList) -> None:
        self.world = world
        self.servers = [Server(i) for i in range(3)]
        self.streams = {name: SessionStream(name, i % 3) for i, name in enumerate(streams.streams)}
        self.bucket = Bucket(streams)
        self.link = [[True] * 3 for _ in range(hosts)]
        self.route = [[True] * 3 for _ in range(3)]
        self.slow_host = [0.0] * hosts
        self.slow_server = [0.0] * 3
        self.slow_replies = [0.0] * hosts
        self.loss = 0.0
        self.lost_replies = 0.0
        self.spurious = 0.0
        self._watch_after: dict[tuple[int, str], float] = {}

    def create(self, name: str, server: int) -> None:
        """A new session stream."""
        self.streams[name] = SessionStream(name, server)

    # --- who reaches whom

    def connected(self, process: Process) -> bool:
        """Whether the process's connection works right now (it may not know yet that it does not)."""
        at = process.conn
        if at is None:
            return False
        server = self.servers[at[0]]
        return server.up and server.life == at[1] and self.link[process.host.index][at[0]]

    def reaches(self, process: Process, target: int) -> bool:
        """Whether the process gets to that server through the one that it is connected to."""
        return self.connected(process) and self.servers[target].up and self.route[process.conn[0]][target]  # type: ignore[index]

    def _has_majority(self, server: int) -> bool:
        return (
            self.servers[server].up
            and sum(1 for other in self.servers if other.up and self.route[server][other.index]) >= 2
        )

    def operator(self, operation: Callable[[], Any], wanted: Callable[[], bool] = lambda: True) -> None:
        """Somebody at a keyboard wants this done in the bucket, and tries until it is or is not *wanted*."""
        world, bucket = self.world, self.bucket
        if not wanted():
            return
        if self._has_majority(bucket.on_server) and world.now >= bucket.ready_at:
            operation()
        else:
            world.after(0.1, self.operator, operation, wanted)

    def changed(self) -> None:
        """A server or a link changed: the bucket may need another leader; connections may break."""
        world = self.world
        if not self._has_majority(self.bucket.on_server):
            others = [s.index for s in self.servers if self._has_majority(s.index)]
            if others:
                self.bucket.on_server = world.rng.choice(others)
                self.bucket.ready_at = world.now + world.rng.uniform(1.0, 4.0)
                world.count("re-elections of the bucket")
                world.log(
                    "nats",
                    f"bucket elects server {self.bucket.on_server}, ready at {self.bucket.ready_at:.2f}",
                )
        for host in world.hosts:
            for process in (host.node, host.keeper):
                if process is not None and process.alive and process.conn and not self.connected(process):
                    process.notice_break()

    # --- requests

    def call(
        self,
        process: Process,
        stream: str | None,
        operation: Callable[[], Any],
        timeout: float,
        done: Callable[..., None],
        *args: Any,
    ) -> None:
        """One request to *stream* (None: the bucket); *done* gets its result, or UNANSWERED in the end."""
        world, random = self.world, self.world.rng.random
        deadline = world.now + timeout
        target = self.bucket.on_server if stream is None else self.streams[stream].server
        if not self.reaches(process, target) or (self.loss and random() < self.loss):
            world.at(deadline, process.run, done, UNANSWERED, *args)
            return
        slow = self.slow_host[process.host.index] + self.slow_server[target]
        delay = 0.0005 + 0.003 * random() + slow * random()
        world.at(
            world.now + delay, self._arrive, process, stream, target, self.servers[target].life, operation,
            deadline, done, args,
        )  # fmt: skip

    def _arrive(
        self, process: Process, stream: str | None, target: int, life: int, operation: Callable[[], Any],
        deadline: float, done: Callable[..., None], args: tuple[Any, ...],
    ) -> None:  # fmt: skip
        world, random = self.world, self.world.rng.random
        server = self.servers[target]
        unavailable = not server.up or server.life != life
        if stream is None and not unavailable:
            unavailable = (
                self.bucket.on_server != target
                or world.now < self.bucket.ready_at
                or not self._has_majority(target)
            )
        if unavailable:
            world.at(max(deadline, world.now), process.run, done, UNANSWERED, *args)
            return
        result = operation()
        host = process.host.index
        slow = self.slow_host[host] + self.slow_server[target] + self.slow_replies[host]
        back = world.now + 0.0005 + 0.003 * random() + slow * random()
        lost = not self.reaches(process, target) or (self.lost_replies and random() < self.lost_replies)
        if lost or back > deadline:
            world.count("lost replies")
            world.at(max(deadline, world.now), process.run, done, UNANSWERED, *args)
        else:
            world.at(back, process.run, done, result, *args)

    # --- operations on a session stream

    def put(self, stream: str, session: SessionId, body: SessionBody, expect: int | None) -> Any:
        """Compare-and-set of a session key (None: without comparing); returns its revision, or REFUSED."""
        world, store = self.world, self.streams[stream]
        before = store.keys.get(session)
        if expect is not None and (before[0] if before else 0) != expect:
            return REFUSED
        if self.spurious and world.rng.random() < self.spurious:
            world.count("spurious refusals")
            return REFUSED
        if before is not None and before[1].tombstone and not body.tombstone and not world.rules.no_cas:
            world.fail("session", f"{session}: a renewal overwrote a tombstone in {stream}")
        store.seq += 1
        store.keys[session] = (store.seq, body)
        store.log.append((world.now, session, before))
        self._publish(
            stream, store.server, "on_session", session, store.seq, body, before[0] if before else 0
        )
        return store.seq

    def get(self, stream: str, session: SessionId) -> Any:
        """A session key: revision and body, or None."""
        return self.streams[stream].keys.get(session)

    def state(self, stream: str) -> Any:
        """Everything in a session stream."""
        return dict(self.streams[stream].keys)

    # --- operations on the bucket

    def lead(
        self, record: LeaderRecord, expect: int, pause: Pausing = (0, False), *, members: int | None = None
    ) -> Any:
        """Compare-and-set of the leader key. *pause*: what its sender knew of one when it sent this.
        *members*: the revision at which the member list has to be."""
        world, bucket, session = self.world, self.bucket, record.session
        if bucket.leader.revision != expect or (members is not None and bucket.members[0] != members):
            return REFUSED
        if self.spurious and world.rng.random() < self.spurious:
            world.count("spurious refusals")
            return REFUSED
        if session is not None:
            world.take(session, bucket, pause)
        bucket.seq += 1
        record = msgspec.structs.replace(record, revision=bucket.seq)
        bucket.history.append(record)
        world.log("nats", f"leader key at {bucket.seq}: {session or f'nobody, successor {record.successor}'}")
        self._publish("bucket", bucket.on_server, "on_bucket", "leader", record, expect)
        return bucket.seq

    def write_members(self, members: MemberList, expect: int, epoch: int) -> Any:
        """Compare-and-set of the member list, fenced with the leader's epoch."""
        bucket = self.bucket
        if bucket.members[0] != expect or bucket.leader.revision != epoch:
            return REFUSED
        if self.spurious and self.world.rng.random() < self.spurious:
            return REFUSED
        return self._write_members(members)

    def _write_members(self, members: MemberList) -> int:
        bucket = self.bucket
        bucket.seq += 1
        bucket.members = (bucket.seq, members)
        self.world.log("nats", f"members at {bucket.seq}: {', '.join(members.nodes)}")
        self._publish("bucket", bucket.on_server, "on_bucket", "members", bucket.members, 0)
        return bucket.seq

    def forget(self, name: str) -> None:
        """An operator takes a node off the member list: never the one that leads, nor the last."""
        _, members = self.bucket.members
        leader = self.bucket.leader.session
        leads = leader is not None and leader.node == name
        if members is not None and name in members.nodes and len(members.nodes) > 1 and not leads:
            nodes = {node: address for node, address in members.nodes.items() if node != name}
            self._write_members(msgspec.structs.replace(members, nodes=nodes))

    def claim(self, session: SessionId) -> Any:
        """The member key of a node: it lives under this session now."""
        self.bucket.seq += 1
        self.bucket.living[session.node] = session
        return self.bucket.seq

    def note_fenced(self, note: FenceNote) -> Any:
        """Somebody says that nothing of a session runs any more."""
        bucket = self.bucket
        bucket.seq += 1
        bucket.notes[note.session.node] = note
        self._publish("bucket", bucket.on_server, "on_bucket", "fenced", note, 0)
        return bucket.seq

    def offer(self, candidate: Candidate) -> Any:
        """A node's offer to lead."""
        self.bucket.seq += 1
        self.bucket.offers[candidate.session.node] = candidate
        self._publish("bucket", self.bucket.on_server, "on_bucket", "offer", candidate, 0)
        return self.bucket.seq

    def set_pause(self, paused: bool) -> None:
        """An operator pauses or resumes the app."""
        bucket = self.bucket
        bucket.seq += 1
        bucket.pause = (bucket.seq, paused)
        self.world.log("nats", "the app is paused" if paused else "the app is resumed")
        self._publish("bucket", bucket.on_server, "on_bucket", "pause", bucket.pause, 0)

    def nominate(self, node: str) -> None:
        """An operator says who shall follow the reign that there is now."""
        bucket = self.bucket
        nomination = Nomination(bucket.leader.revision, node, "operator")
        bucket.seq += 1
        bucket.nomination = (bucket.seq, nomination)
        bucket.named.add(nomination)
        self.world.log("nats", f"{node} is to follow {bucket.leader.revision}")
        self._publish("bucket", bucket.on_server, "on_bucket", "nomination", bucket.nomination, 0)

    def fenced(self, epoch: int) -> Any:
        """A write that the server takes only while the leader key is at *epoch*."""
        accepted = self.bucket.leader.revision == epoch
        self.world.fenced_write(epoch, self.bucket.leader.revision, accepted)
        if not accepted:
            return REFUSED
        self.bucket.seq += 1
        return self.bucket.seq

    def use_streams(self, streams: StreamList, expect_generation: int) -> Any:
        """Replace the list of session streams."""
        if self.bucket.streams.generation != expect_generation:
            return REFUSED
        self.bucket.seq += 1
        self.bucket.streams = streams
        self.world.log("nats", f"session streams: {streams}")
        self._publish("bucket", self.bucket.on_server, "on_bucket", "streams", streams, 0)
        return self.bucket.seq

    def bucket_state(self) -> Any:
        """What the bucket holds; the leader key maybe from a replica that is a write behind."""
        history = self.bucket.history
        stale = len(history) > 1 and self.world.rng.random() < 0.1
        bucket = self.bucket
        leader = history[-2 if stale else -1]
        offers = tuple(bucket.offers.values())
        return (leader, offers, bucket.streams, bucket.pause, bucket.nomination, bucket.members)

    # --- watches

    def _publish(self, channel: str, server: int, handler: str, *args: Any) -> None:
        """Deliver to every node that is reached now, in order for each; who is not reached misses it."""
        world = self.world
        at = world.now + 0.0005 + 0.003 * world.rng.random() + self.slow_server[server]
        together: list[Callable[..., None]] = []
        for host in world.hosts:
            node = host.node
            if node is None or not node.alive or not self.reaches(node, server):
                continue
            if node.watch_drop and world.rng.random() < node.watch_drop:
                world.count("dropped watch messages")
                continue
            mine = at + node.watch_lag + self.slow_host[host.index]
            key = (node.life, channel)
            before = self._watch_after.get(key, 0.0)
            if mine <= at and before < at:
                together.append(node.watches.watched)
                self._watch_after[key] = at
            else:
                mine = max(mine, before + 1e-6)
                self._watch_after[key] = mine
                world.at(mine, node.watches.watched, node.conn, channel, handler, args)
        if together:
            world.at(at, _deliver, together, channel, handler, args)


def _deliver(watchers: list[Callable[..., None]], channel: str, handler: str, args: tuple[Any, ...]) -> None:
    for watched in watchers:
        watched(None, channel, handler, args)
