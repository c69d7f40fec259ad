"""A platform seen from outside of its nodes: who is there, who leads, what happened, and "step down".

::

    async with PlatformClient("prod", NatsOptions(urls=("nats://10.0.0.1:4222",))) as client:
        for node in await client.nodes():
            print(node.node, node.answers)
        await client.step_down("wiki", to="n2", reason="maintenance of n1")

It logs in to NATS with the caller's own credentials; what those may not do, it cannot do. In a plain ``with``
it is a :class:`SyncClient`, for code without an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.client_db import DatabaseClient, caller
from phalanx.client_operator import OperatorClient
from phalanx.client_sync import LoopThread, SyncApi
from phalanx.config import NatsOptions
from phalanx.control import StepDownReply, StepDownRequest
from phalanx.coord.election import read_leader
from phalanx.decide.pause import WHOLE_PLATFORM, pause_of
from phalanx.decide.session import SessionBody, StreamList
from phalanx.errors import (
    BusError,
    BusTimeout,
    BusUnavailable,
    ConfigError,
    NatsUnusable,
    Paused,
    PlatformNotFound,
    StepDownFailed,
    WrongRevision,
)
from phalanx.messaging.calling import Api, Caller
from phalanx.names import RESERVED_APPS, SWITCHOVER_KEYS, Names
from phalanx.observe.audit import AuditEntry, follow_audit, read_audit
from phalanx.ports import Message, Record
from phalanx.types import FenceNote, Member, NodeStatus, Pause, PlannedSwitchover, Role, is_dns_label

T = TypeVar("T")

NO_ANSWER = "the node does not answer"
_POLL_SECONDS = 0.25
"""How often the status is asked for while a hand-over is waited for, should its audit entry not come."""

PAUSE_SEEN_SECONDS = 2.0
"""How long a pause waits for the nodes to learn of it."""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """One node as it is seen from outside.

    ``is_live``: its session is not over. A node that died stays listed until it returns.
    ``member`` is None for a node that answers although the platform's bucket does not list it (yet);
    ``status`` is None for one that did not answer.
    """

    node: str
    is_live: bool
    member: Member | None = None
    status: NodeStatus | None = None

    @property
    def answers(self) -> bool:
        """Whether the node answered."""
        return self.status is not None

    @property
    def apps(self) -> tuple[str, ...]:
        """The names of the apps that it declares."""
        if self.status is not None:
            return tuple(app.name for app in self.status.apps)
        return self.member.apps if self.member is not None else ()


class HandOver(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a step-down. ``seconds``: from the request until *active* was seen to be active.

    ``successor`` is who was named, ``active`` who really took over (None: it was not waited for).
    """

    app: str
    previous: str
    successor: str | None = None
    active: str | None = None
    epoch: int = 0
    seconds: float = 0.0


class PauseDone(msgspec.Struct, frozen=True, kw_only=True):
    """What came of pausing or resuming *app* (empty: the platform).

    ``pause``: what holds now, or was ended; ``changed``: False if it was so before. ``unaware``: live nodes
    that have not said within two seconds that they know it. ``unkept``: what is active now and would end with
    its node in spite of the pause: app, node, why.
    """

    app: str
    pause: Pause
    changed: bool
    unaware: tuple[str, ...] = ()
    unkept: tuple[tuple[str, str, str], ...] = ()


class PlatformClient:
    """Use it as ``async with``. *timeout*: how long connecting may take, in seconds.

    Entering raises ConfigError (names), NatsUnusable. Every call raises BusError and its kinds when NATS
    fails, PlatformNotFound when it holds no such platform.
    """

    def __init__(self, platform: str, nats: NatsOptions, *, timeout: float = 5.0) -> None:
        if not is_dns_label(platform):
            raise ConfigError(
                "platform", platform, "not a DNS label", "use 1-63 of a-z, 0-9 and inner hyphens"
            )
        self.names, self._options, self._timeout = Names(platform), nats, timeout
        self._bus: NatsBus | None = None
        self._caller: Caller | None = None
        self._thread: LoopThread | None = None

    async def __aenter__(self) -> Self:
        self._bus = await NatsBus.connect(
            self._options, name=f"phalanx client of {self.names.platform}", timeout=self._timeout
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        caller, self._caller = self._caller, None
        if caller is not None:
            await caller.close()
        bus, self._bus = self._bus, None
        if bus is not None:
            await bus.close()

    def __enter__(self) -> SyncClient:
        self._thread = thread = LoopThread(f"phalanx client of {self.names.platform}")
        try:
            thread.run(self.__aenter__())
        except BaseException:
            thread.close()
            raise
        return SyncClient(self, thread)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                thread.run(self.__aexit__(kind, error, trace))
            finally:
                thread.close()

    @property
    def bus(self) -> NatsBus:
        """The connection. Raises NatsUnusable outside of ``async with``."""
        if self._bus is None:
            raise NatsUnusable("the client is not connected", "use it inside its async with")
        return self._bus

    @property
    def databases(self) -> DatabaseClient:
        """The databases of its apps."""
        return DatabaseClient(self)

    @property
    def operator(self) -> OperatorClient:
        """What an operator does with its apps besides :meth:`step_down`, and what explains their state."""
        return OperatorClient(self)

    def api(self, app: str) -> Api:
        """The calls of *app*, to be made inside the ``async with``. Raises ConfigError."""
        return Api(app, self._calls)

    def _calls(self) -> Caller:
        bus = self.bus
        if self._caller is None:
            self._caller = Caller(lambda: bus, self.names, caller())
        return self._caller

    # --- looking

    async def members(self) -> dict[str, Member]:
        """The nodes as they described themselves, dead ones too, by name."""
        return (await self._state()).members

    async def apps(self) -> tuple[str, ...]:
        """The apps that were ever created on the platform."""
        return (await self._state()).apps

    async def databases_made(self) -> tuple[str, ...]:
        """The apps whose database was ever made: log and object store must exist from then on."""
        return (await self._state()).databases

    async def pauses(self) -> dict[str, Pause]:
        """What is paused, by app; the pause of the whole platform has the key ""."""
        return (await self._state()).pauses

    async def planned_switchovers(self) -> dict[str, PlannedSwitchover]:
        """The hand-overs that are planned, by app."""
        return (await self._state()).switchovers

    async def session_streams(self) -> StreamList | None:
        """Which streams carry the sessions; None while the platform is being set up."""
        return (await self._state()).streams

    async def nodes(self, timeout: float = 1.0) -> list[NodeView]:
        """All nodes, by name, with what they say of themselves.

        Returns as soon as all live members have answered; *timeout* seconds are the bound when one
        does not.
        """
        state = await self._state()
        live = await self._live(state)
        answers = await self._answers(timeout, len(live))
        return [
            NodeView(
                node=node,
                is_live=node in live or node in answers,
                member=state.members.get(node),
                status=answers.get(node),
            )
            for node in sorted({*state.members, *answers})
        ]

    async def status(self, timeout: float = 1.0) -> list[NodeStatus]:
        """What :meth:`nodes` finds, as the nodes' own words; one that is silent says so in ``problems``."""
        return [view.status or _silent(self.names.platform, view) for view in await self.nodes(timeout)]

    async def forget(self, node: str) -> None:
        """Take a node that will not return off the member list. Raises ConfigError while it is alive.

        It comes back by itself when it is started again.
        """
        state = await self._state()
        if node not in state.members:
            known = ", ".join(sorted(state.members)) or "(none)"
            raise ConfigError("node", node, "no member of this platform", f"members are: {known}")
        if node in await self._live(state):
            raise ConfigError("node", node, "its session lives", "stop that node first")
        subject = self.names.key_subject(self.names.platform_bucket, self.names.member_key(node))
        # The compare-and-set refuses it if the node has returned meanwhile.
        await self.bus.write(
            subject, b"", expect=state.member_revisions[node], headers={"KV-Operation": "DEL"}
        )

    # --- fencing

    async def to_be_fenced(self, node: str) -> Member:
        """What is known of *node*'s latest session and its host. Raises ConfigError if nothing is."""
        state = await self._state()
        if node in state.members:
            return state.members[node]
        # One that was forgotten is no member any more, but an app may still wait for it to be fenced.
        for app in state.apps:
            leader = await read_leader(self.bus, self.names, app)
            for session in (*leader.unfenced, *([leader.session] if leader.session else [])):
                if session.node == node:
                    return Member(node, session, 0.0, "", apps=(app,))
        known = ", ".join(sorted(state.members)) or "(none)"
        raise ConfigError("node", node, "no member of this platform", f"members are: {known}")

    async def confirm_off(self, node: str) -> FenceNote:
        """Have it noted, by the caller's word, that *node* is off: takeovers that wait for that go on.

        Raises ConfigError for an unknown node, and for one whose session lives: that one is not off.
        """
        member = await self.to_be_fenced(node)
        if node in await self._live(await self._state()):
            problem = "its session lives, or is not found over yet"
            raise ConfigError("node", node, problem, "see that it is off, wait for the TTL, try again")
        return await self.note_fenced(
            FenceNote(member.session, caller(), system.wall(), "an operator's word")
        )

    async def note_fenced(self, note: FenceNote) -> FenceNote:
        """Note that nothing of a session runs any more, for whoever takes over from it."""
        node = note.session.node
        key = self.names.fenced_key(node, note.app)
        subject = self.names.key_subject(self.names.platform_bucket, key)
        await self.bus.write(subject, msgspec.json.encode(note))
        details = {"fenced_node": node, "session": str(note.session)}
        await self._audit("fence-confirmed", note.app, f"node {node}: {note.said}", details)
        return note

    async def _audit(self, action: str, app: str, reason: str, details: dict[str, str]) -> None:
        entry = AuditEntry(
            id=f"{action}-{secrets.token_hex(8)}",
            time=round(system.wall(), 6),
            node=caller(),
            category="app" if app else "platform",
            action=action,
            app=app,
            reason=reason,
            details={"by": caller(), **details},
        )
        subject = self.names.audit_subject(entry.category, entry.action)
        await self.bus.write(subject, msgspec.json.encode(entry), headers={"Nats-Msg-Id": entry.id})

    async def _answers(self, timeout: float, expected: int) -> dict[str, NodeStatus]:
        if not expected:
            return {}
        found = await self.bus.gather(self.names.status_subject(), timeout=timeout, most=expected)
        answers = [_decoded(message, NodeStatus) for message in found]
        return {answer.node: answer for answer in answers if answer is not None}

    async def _state(self) -> _State:
        """The platform's bucket, as it is now."""
        bucket = self.names.platform_bucket
        stream, prefix = self.names.bucket_stream(bucket), self.names.key_subject(bucket, "")
        try:
            records = await self.bus.snapshot(stream, f"{prefix}>")
        except BusUnavailable:
            # Nobody serves that bucket: it does not exist, or NATS has no leader for it just now.
            if self.bus.is_connected and await provision.stream_info(self.bus, stream) is None:
                raise PlatformNotFound(self.names.platform, self._where) from None
            raise
        return _State.of({record.subject.removeprefix(prefix): record for record in records})

    @property
    def _where(self) -> str:
        return ", ".join(self._options.urls)

    async def _live(self, state: _State) -> set[str]:
        """Members whose session a majority of session streams neither ends nor lacks."""
        streams = state.streams
        if streams is None:
            return set(state.members)
        bodies = await asyncio.gather(*(self._sessions(stream) for stream in streams.all_streams))
        by_stream = dict(zip(streams.all_streams, bodies, strict=True))
        live: set[str] = set()
        for node, member in state.members.items():
            gone = [
                s for s, held in by_stream.items() if held is not None and str(member.session) not in held
            ]
            if not streams.has_majority(gone):
                live.add(node)
        return live

    async def _sessions(self, stream: str) -> set[str] | None:
        """The sessions that *stream* holds and that have no tombstone there; None if it can't be read."""
        try:
            records = await self.bus.snapshot(stream, self.names.session_subjects(stream))
        except BusError:
            return None
        held: set[str] = set()
        for record in records:
            with contextlib.suppress(msgspec.MsgspecError):
                if not record.removed and not msgspec.json.decode(record.data, type=SessionBody).tombstone:
                    held.add(str(self.names.session_of(record.subject)))
        return held

    # --- changing

    async def step_down(
        self, app: str, to: str | None = None, *, reason: str = "", timeout: float = 60.0, wait: bool = True
    ) -> HandOver:
        """Have the active node of *app* hand over, to node *to* if given; wait until the next one is active.

        Without *wait* it returns when the old section has ended. Raises ConfigError for an app that the
        platform does not have and for a node that cannot take over, Paused, StepDownFailed when nobody is
        active or nobody took over within *timeout* seconds.
        """
        deadline = system.now() + timeout
        await self.check_app(app)
        await self.check_not_paused(app)
        active = _active_of(await self.nodes(), app, Role.ACTIVE, Role.ACTIVATING)
        if active is None:
            raise StepDownFailed(app, "no node is active for it", "see: phalanx status")
        before, began = active[1], system.now()
        changed = asyncio.Event()
        subscription = await self.bus.subscribe(
            self.names.audit_subject("app", "active"), lambda _: changed.set()
        )
        try:
            reply = await self._ask_to_step_down(app, to, reason, timeout)
            done = HandOver(app=app, previous=reply.node, successor=reply.successor)
            if not wait:
                return msgspec.structs.replace(done, seconds=system.now() - began)
            return await self._taken_over(done, before, began, deadline, changed)
        finally:
            await subscription.unsubscribe()

    async def check_app(self, app: str) -> None:
        """Raises ConfigError for an app that the platform does not have."""
        known = await self.apps()
        if not is_dns_label(app) or app in RESERVED_APPS or app not in known:
            remedy = f"choose from: {', '.join(known)}" if known else "it has no apps yet"
            raise ConfigError("app", app, f"the platform {self.names.platform} has no such app", remedy)

    async def _ask_to_step_down(self, app: str, to: str | None, reason: str, timeout: float) -> StepDownReply:
        request = StepDownRequest(to=to, reason=reason, by=caller())
        try:
            answer = await self.bus.request(
                self.names.control_subject(app, "stepdown"), msgspec.json.encode(request), timeout=timeout
            )
        except (BusUnavailable, BusTimeout) as error:
            raise StepDownFailed(
                app,
                f"its active node did not answer ({error.description})",
                f"see phalanx status; this user may need the right to publish to {error.operation}",
            ) from error
        reply = _decoded(answer, StepDownReply)
        if reply is None:
            raise StepDownFailed(app, "the answer is not understood", "do all nodes run this version?")
        if reply.bad_input:
            raise ConfigError("node", to, reply.error, reply.remedy or "see: phalanx status")
        if reply.error:
            raise StepDownFailed(app, reply.error, reply.remedy or "see: phalanx status")
        return reply

    async def _taken_over(
        self, done: HandOver, before: int, began: float, deadline: float, changed: asyncio.Event
    ) -> HandOver:
        while True:
            changed.clear()
            nodes = await self.nodes(min(1.0, max(0.05, deadline - system.now())))
            active = _active_of(nodes, done.app, Role.ACTIVE)
            if active is not None and active[1] > before:
                return msgspec.structs.replace(
                    done, active=active[0], epoch=active[1], seconds=system.now() - began
                )
            if system.now() >= deadline:
                problem = f"{done.previous} stepped down, but nobody has taken over"
                raise StepDownFailed(done.app, problem, "see: phalanx status")
            await wait_at_most(changed, _POLL_SECONDS)

    async def check_not_paused(self, app: str) -> None:
        """Raises Paused if *app*, or the whole platform, is."""
        pauses = await self.pauses()
        if (pause := pause_of(app, pauses)) is not None:
            raise Paused(app, str(pause), whole=app not in pauses)

    async def pause(self, app: str | None = None, *, reason: str = "") -> PauseDone:
        """Let nothing of *app* (None: of the whole platform) change hands until it is resumed.

        Returns when all nodes that answer know it, or after two seconds. Pausing twice is harmless: the first
        pause stays. Raises ConfigError for an app that the platform does not have.
        """
        return await self._set_pause(app, Pause(caller(), system.wall(), reason), "paused")

    async def resume(self, app: str | None = None) -> PauseDone | None:
        """End the pause of *app* (None: that of the platform; apps that were paused one by one stay so).

        None if it was not paused. Raises ConfigError for an app that the platform does not have, and for one
        that is paused only with the whole platform.
        """
        pauses = await self.pauses()
        if app is not None and app not in pauses and WHOLE_PLATFORM in pauses:
            await self.check_app(app)
            raise ConfigError("app", app, "not paused by itself: the whole platform is", "phalanx resume")
        if (pause := pauses.get(app or WHOLE_PLATFORM)) is None:
            if app is not None:
                await self.check_app(app)
            return None
        return await self._set_pause(app, pause, "resumed")

    async def _set_pause(self, app: str | None, pause: Pause, action: str) -> PauseDone:
        if app is not None and action == "paused":
            await self.check_app(app)
        names, key = self.names, app or WHOLE_PLATFORM
        subject = names.key_subject(names.platform_bucket, names.pause_key(key))
        stream = names.bucket_stream(names.platform_bucket)
        while True:
            await self._state()  # there is such a platform
            there = await self.bus.read(stream, subject)
            held = None if there is None or there.removed else _decoded(there, Pause)
            if (held is not None) is (action == "paused"):
                unkept = _unkept(await self.nodes(), key) if held is not None else ()
                return PauseDone(app=key, pause=held or pause, changed=False, unkept=unkept)
            expect = there.revision if there is not None else 0
            try:
                if action == "paused":
                    await self.bus.write(subject, msgspec.json.encode(pause), expect=expect)
                else:
                    await self.bus.write(subject, expect=expect, headers={"KV-Operation": "DEL"})
                break
            except WrongRevision:
                continue  # somebody else did the same, or the opposite
        details = {} if action == "paused" else {"paused_by": pause.by}
        await self._audit(action, key, pause.reason, details)
        if action != "paused":
            return PauseDone(app=key, pause=pause, changed=True)
        unaware, unkept = await self._aware(key)
        return PauseDone(app=key, pause=pause, changed=True, unaware=unaware, unkept=unkept)

    async def _aware(self, app: str) -> tuple[tuple[str, ...], tuple[tuple[str, str, str], ...]]:
        """See PauseDone: ``unaware``, ``unkept``."""
        deadline = system.now() + PAUSE_SEEN_SECONDS
        while True:
            nodes = [view for view in await self.nodes(0.5) if view.is_live]
            unaware = tuple(view.node for view in nodes if not _knows(view, app))
            if not unaware or system.now() >= deadline:
                return unaware, _unkept(nodes, app)
            await asyncio.sleep(_POLL_SECONDS / 5)

    # --- the audit log

    async def audit(self, since: float | None = None, limit: int = 100) -> list[AuditEntry]:
        """The newest *limit* entries, oldest first; *since* Unix seconds."""
        await self._state()
        return await read_audit(self.bus, self.names, since=since, limit=limit)

    async def follow_audit(self, since: float | None = None) -> AsyncIterator[AuditEntry]:
        """Each entry as it comes, for ever; with *since* (Unix seconds) the earlier ones first."""
        await self._state()
        async for entry in follow_audit(self.bus, self.names, since=since):
            yield entry


class SyncClient:
    """A client in a plain ``with``. From any thread but that of its own loop."""

    def __init__(self, client: PlatformClient, thread: LoopThread) -> None:
        self.client, self._thread = client, thread

    def api(self, app: str) -> SyncApi:
        """The calls of *app*. Raises ConfigError."""
        return SyncApi(self.client.api(app), self._thread)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Anything else: ``client.run(client.client.nodes())``."""
        return self._thread.run(work)


class _State(msgspec.Struct, frozen=True):
    """What the platform's bucket says."""

    members: dict[str, Member]
    apps: tuple[str, ...]
    databases: tuple[str, ...]
    streams: StreamList | None
    member_revisions: dict[str, int]
    pauses: dict[str, Pause]
    switchovers: dict[str, PlannedSwitchover]

    @classmethod
    def of(cls, records: Mapping[str, Record]) -> _State:
        held = {key: record for key, record in records.items() if not record.removed}
        streams = held.get(Names.SESSIONS_KEY)
        return cls(
            {
                key.removeprefix("member."): member
                for key, record in held.items()
                if key.startswith("member.") and (member := _decoded(record, Member)) is not None
            },
            tuple(sorted(key.removeprefix("app.") for key in held if key.startswith("app."))),
            tuple(sorted(key.removeprefix("database.") for key in held if key.startswith("database."))),
            _decoded(streams, StreamList) if streams is not None else None,
            {
                key.removeprefix("member."): record.revision
                for key, record in held.items()
                if key.startswith("member.")
            },
            {
                key.removeprefix(Names.PAUSE_KEY).removeprefix("."): pause
                for key, record in held.items()
                if (key == Names.PAUSE_KEY or key.startswith(f"{Names.PAUSE_KEY}."))
                and (pause := _decoded(record, Pause)) is not None
            },
            {
                planned.app: planned
                for key, record in held.items()
                if key.startswith(f"{SWITCHOVER_KEYS}.")
                and (planned := _decoded(record, PlannedSwitchover)) is not None
            },
        )


def _decoded(message: Message | Record, kind: type[T]) -> T | None:
    """What a node of this or a later version wrote; None for what is not understood."""
    try:
        return msgspec.json.decode(message.data, type=kind)
    except msgspec.MsgspecError:
        return None


def _knows(view: NodeView, app: str) -> bool:
    if view.status is None:
        return False
    return all(each.pause is not None for each in view.status.apps if app in ("", each.name))


def _unkept(nodes: Iterable[NodeView], app: str) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (each.name, view.node, each.unkept)
        for view in nodes
        if view.status is not None
        for each in view.status.apps
        if each.unkept and app in ("", each.name)
    )


def _silent(platform: str, view: NodeView) -> NodeStatus:
    member = view.member
    return NodeStatus(
        platform,
        view.node,
        member.version if member is not None else "",
        str(member.session) if member is not None else "",
        labels=member.labels if member is not None else {},
        problems=(NO_ANSWER if view.is_live else f"{NO_ANSWER}, its session is over",),
    )


def _active_of(nodes: Iterable[NodeView], app: str, *roles: Role) -> tuple[str, int] | None:
    """The node that has one of *roles* for *app*, and its epoch; of two the one with the higher epoch."""
    found = [
        (status.epoch, view.node)
        for view in nodes
        if view.status is not None
        for status in view.status.apps
        if status.name == app and status.role in roles
    ]
    if not found:
        return None
    epoch, node = max(found)
    return node, epoch


__all__ = ["HandOver", "NodeView", "PauseDone", "PlatformClient", "SyncClient"]
