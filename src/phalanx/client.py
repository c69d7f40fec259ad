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
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.client_caller import caller, record
from phalanx.client_db import DatabaseClient
from phalanx.client_events import EventOperations
from phalanx.client_lock_views import LockViews
from phalanx.client_locks import ClientLocks, ClientSessions, SyncLock, held_by_thread
from phalanx.client_operator import OperatorClient
from phalanx.client_pause import PauseClient, PauseDone
from phalanx.client_pool import Scaled, check_replicas, pool_in, scale
from phalanx.client_request import ask_active
from phalanx.client_state import PlatformBucket, decoded, live_members
from phalanx.client_sync import LoopThread, SyncApi, SyncEvents
from phalanx.client_views import NO_ANSWER, NodeView, active_of, silent
from phalanx.config import NatsOptions
from phalanx.control import StepDownRequest
from phalanx.coord.admission import forget_member
from phalanx.coord.election import read_leader
from phalanx.coord.locks import Lock, Semaphore
from phalanx.decide.pause import pause_of
from phalanx.decide.session import StreamList
from phalanx.errors import (
    BusError,
    BusUnavailable,
    ConfigError,
    NatsUnusable,
    Paused,
    PlatformNotFound,
    StepDownFailed,
)
from phalanx.messaging.api import Api
from phalanx.messaging.calling import Caller
from phalanx.messaging.dead_letters import DeadLetters
from phalanx.messaging.events import Events
from phalanx.names import RESERVED_APPS, Names
from phalanx.observe.audit import AuditEntry, follow_audit, read_audit
from phalanx.ports import STREAM_NOT_FOUND
from phalanx.types import FenceNote, Member, NodeStatus, Pause, PlannedSwitchover, Role, is_dns_label

T = TypeVar("T")

_POLL_SECONDS = 0.25
"""How often the status is asked for while a hand-over is waited for, should its audit entry not come."""


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
        self._sessions: ClientSessions | None = None

    async def __aenter__(self) -> Self:
        self._bus = await NatsBus.connect(
            self._options, name=f"phalanx client of {self.names.platform}", timeout=self._timeout
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sessions, self._sessions = self._sessions, None
        if sessions is not None:
            await sessions.close()
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

    def locks(self, app: str | None = None) -> ClientLocks:
        """The locks and semaphores of *app* (None: of the platform), held through a session of this client,
        which begins with the first of them. Inside the ``async with``; see docs/kv-and-locks.md."""
        if self._sessions is None:
            self._sessions = ClientSessions(lambda: self.bus, self.names)
        return ClientLocks(self._sessions, app)

    def lock(
        self, name: str, *, app: str | None = None, timeout: float = 10.0, cancel: bool = False
    ) -> AbstractAsyncContextManager[Lock]:
        """Hold a lock: ``async with client.lock("x") as held``. See :meth:`locks`."""
        return self.locks(app).lock(name, timeout=timeout, cancel=cancel)

    def semaphore(self, name: str, *, permits: int, app: str | None = None) -> Semaphore:
        """A semaphore: ``async with client.semaphore("x", permits=3).hold() as held``. See :meth:`locks`."""
        return self.locks(app).semaphore(name, permits=permits)

    @property
    def lock_views(self) -> LockViews:
        """Who holds locks and waits for them, and taking one away by force."""
        return LockViews(self)

    def _calls(self) -> Caller:
        bus = self.bus
        if self._caller is None:
            self._caller = Caller(lambda: bus, self.names, caller())
        return self._caller

    def events(self, app: str | None = None) -> Events:
        """The events of *app*, None: of the whole platform, to be used inside the ``async with``. Raises
        ConfigError."""
        if app is not None and (not is_dns_label(app) or app in RESERVED_APPS):
            raise ConfigError("events", app, "no name of an app", "use 1-63 of a-z, 0-9 and inner hyphens")
        return Events.over(lambda: self.bus, self.names, app)

    @property
    def event_operations(self) -> EventOperations:
        """The durable consumers of its events."""
        return EventOperations(self)

    @property
    def dead_letters(self) -> DeadLetters:
        """The events that handlers could not handle."""
        return DeadLetters(self.bus, self.names)

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
        live = await live_members(self.bus, self.names, state)
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
        return [view.status or silent(self.names.platform, view) for view in await self.nodes(timeout)]

    async def forget(self, node: str) -> None:
        """Take a node that will not return off the member list. Raises ConfigError while it is alive.

        It comes back by itself when it is started again.
        """
        state = await self._state()
        if node in await live_members(self.bus, self.names, state):
            raise ConfigError("node", node, "its session lives", "stop that node first")
        # One that has ended in order is no member, but its promise is still needed where an app holds.
        listed: list[bool] = []
        for app in state.apps:
            try:
                leader = await read_leader(self.bus, self.names, app)
                listed.append(await forget_member(self.bus, self.names, app, node, leader))
            except BusError as error:
                if error.code != STREAM_NOT_FOUND:  # a bucket that has vanished has no list
                    raise
        if node not in state.members:
            if any(listed):
                return
            known = ", ".join(sorted(state.members)) or "(none)"
            raise ConfigError("node", node, "no member of this platform", f"members are: {known}")
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
        if node in await live_members(self.bus, self.names, await self._state()):
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
        reason = f"node {node}: {note.said}"
        await record(self.bus, self.names, "fence-confirmed", app=note.app, reason=reason, details=details)
        return note

    async def _answers(self, timeout: float, expected: int) -> dict[str, NodeStatus]:
        if not expected:
            return {}
        found = await self.bus.gather(self.names.status_subject(), timeout=timeout, most=expected)
        answers = [decoded(message, NodeStatus) for message in found]
        return {answer.node: answer for answer in answers if answer is not None}

    async def _state(self) -> PlatformBucket:
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
        return PlatformBucket.of({record.subject.removeprefix(prefix): record for record in records})

    @property
    def _where(self) -> str:
        return ", ".join(self._options.urls)

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
        await self.check_elected(app)
        await self.check_not_paused(app)
        active = active_of(await self.nodes(), app, Role.ACTIVE, Role.ACTIVATING)
        if active is None:
            raise StepDownFailed(app, "no node is active for it", "see: phalanx status")
        before, began = active[1], system.now()
        changed = asyncio.Event()
        subscription = await self.bus.subscribe(
            self.names.audit_subject("app", "active"), lambda _: changed.set()
        )
        try:
            request = StepDownRequest(to=to, reason=reason, by=caller())
            reply = await ask_active(self.bus, self.names, app, "stepdown", request, to, timeout)
            done = HandOver(app=app, previous=reply.node, successor=reply.successor)
            if not wait:
                return msgspec.structs.replace(done, seconds=system.now() - began)
            return await self._taken_over(done, before, began, deadline, changed)
        finally:
            await subscription.unsubscribe()

    async def scale(self, app: str, replicas: int | None = None, *, reset: bool = False) -> Scaled:
        """Have *replicas* nodes be active for the pool *app* (0 to 1024; None: all), whatever they declare.

        The word stays until the next one, or until it is taken back (*reset*). It counts at once; what has to
        end ends gracefully. Raises ConfigError for an app that is no pool.
        """
        check_replicas(replicas)
        await self.check_app(app)
        declared = pool_in(await self.nodes(), app).declared
        return await scale(self.bus, self.names, app, replicas, by=caller(), declared=declared, reset=reset)

    async def check_app(self, app: str) -> None:
        """Raises ConfigError for an app that the platform does not have."""
        known = await self.apps()
        if not is_dns_label(app) or app in RESERVED_APPS or app not in known:
            remedy = f"choose from: {', '.join(known)}" if known else "it has no apps yet"
            raise ConfigError("app", app, f"the platform {self.names.platform} has no such app", remedy)

    async def check_elected(self, app: str) -> None:
        """Raises ConfigError for an app that no one node is active for: nothing can be handed over."""
        statuses = [s for view in await self.nodes() if view.status is not None for s in view.status.apps]
        kind = next((s.pattern for s in statuses if s.name == app and s.pattern != "active-passive"), "")
        if kind:
            problem = f"it is a {kind}: there is no one active node that could hand over"
            remedy = "to empty a node stop it; see: phalanx status"
            if kind == "pool":
                remedy = f"to empty a node stop it; how many are active says: phalanx scale {app} N"
            raise ConfigError("app", app, problem, remedy)

    async def _taken_over(
        self, done: HandOver, before: int, began: float, deadline: float, changed: asyncio.Event
    ) -> HandOver:
        while True:
            changed.clear()
            nodes = await self.nodes(min(1.0, max(0.05, deadline - system.now())))
            active = active_of(nodes, done.app, Role.ACTIVE)
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
        return await PauseClient(self).pause(app, reason)

    async def resume(self, app: str | None = None) -> PauseDone | None:
        """End the pause of *app* (None: that of the platform; apps that were paused one by one stay so).

        None if it was not paused. Raises ConfigError for an app that the platform does not have, and for one
        that is paused only with the whole platform.
        """
        return await PauseClient(self).resume(app)

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

    def lock(
        self, name: str, *, app: str | None = None, timeout: float = 10.0
    ) -> AbstractContextManager[SyncLock]:
        """Hold a lock: ``with client.lock("x") as held``. See :meth:`PlatformClient.locks`."""
        return held_by_thread(lambda: self.client.lock(name, app=app, timeout=timeout), self._thread)

    def semaphore(
        self, name: str, *, permits: int, app: str | None = None, timeout: float = 10.0
    ) -> AbstractContextManager[SyncLock]:
        """Hold a permit: ``with client.semaphore("x", permits=3) as held``."""
        semaphore = self.client.semaphore(name, permits=permits, app=app)
        return held_by_thread(lambda: semaphore.hold(timeout=timeout), self._thread)

    def events(self, app: str | None = None) -> SyncEvents:
        """The events of *app*, None: of the whole platform. Raises ConfigError."""
        return SyncEvents(self.client.events(app), self._thread)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Anything else: ``client.run(client.client.nodes())``."""
        return self._thread.run(work)


__all__ = ["NO_ANSWER", "HandOver", "NodeView", "PauseDone", "PlatformClient", "SyncClient"]
