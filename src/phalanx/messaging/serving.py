"""The calls to one app on one node: who may begin, what runs, and how it ends.

Handlers of the active instance run inside the active section, as its last step: no call begins before it is
wholly active, and none runs on when it has ended. What comes for a reign that is about to begin is held until
it has; what comes for one that is over is answered "moved", so that whoever called goes on elsewhere.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from phalanx import system
from phalanx.aio import Deadlines
from phalanx.errors import CallError, Fenced, HookFailed, NotActive, PhalanxError, SessionLost
from phalanx.messaging import call_wire as wire
from phalanx.messaging.content import ContentError, encode
from phalanx.messaging.context import CURRENT, CallContext
from phalanx.messaging.handlers import Handler, Handlers
from phalanx.messaging.incoming import IncomingCall, Together
from phalanx.messaging.micro import MicroService
from phalanx.messaging.middleware import traced
from phalanx.messaging.stream_out import OutgoingStream
from phalanx.names import Names
from phalanx.observe.tracing import tracer
from phalanx.ports import Bus, Message, Subscription

log = logging.getLogger("phalanx.calls")

DRAIN_SECONDS = 2.0
"""How long calls that run may go on when the active section stands down."""

CANCEL_SECONDS = 1.0
"""How long a handler may take to end after it was cancelled."""

MAX_HELD = 1024
"""Calls that wait for this node to become active; more are answered "busy"."""

HEADER_ROOM_BYTES = 4096
"""What of the largest message is kept for headers."""

_NEVER_AGAIN = 1 << 63
"""No reign has so high an epoch."""


class CallServer:
    """What one app answers on this node. ``open`` and ``close`` with the node, ``begin`` and ``end`` with the
    active section."""

    def __init__(self, app: str, node: str, handlers: Handlers, bus: Bus, names: Names, kv: Any) -> None:
        self._app, self._node, self._handlers = app, node, handlers
        self._bus, self._names, self._kv = bus, names, kv
        self._subscriptions: list[Subscription] = []
        self._leader_subscription: Subscription | None = None
        self._active: Any = None
        self._epoch = 0
        """That of the section whose calls are answered now; 0: none."""
        self._over = 0
        """No call begins here for a reign up to this one."""
        self._leading = wire.Leading(idempotent=handlers.idempotent)
        self.instances: Callable[[], tuple[str, ...]] = lambda: (node,)
        """The nodes that run the app, as this one knows them."""
        self._held: deque[IncomingCall] = deque()
        self._running: dict[asyncio.Task[None], IncomingCall] = {}
        self._deadlines: Deadlines[IncomingCall] = Deadlines(IncomingCall.expire)
        self._loop = asyncio.get_running_loop()
        self._by_id: dict[str, IncomingCall] = {}
        self._draining = 0
        self._micro = MicroService(app, node, handlers, bus, names)

    # --- with the node

    async def open(self) -> None:
        """Begin to answer. Raises BusError."""
        self._handlers.serve()
        bus, names, app = self._bus, self._names, self._app
        queue = names.call_queue(app)
        for subject, on_message, group in (
            (names.call_who_subject(app), self._on_who, queue),
            (names.call_cancel_subject(app), self._on_cancel, ""),
            (names.call_flow_subject(app, self._node), self._on_flow, ""),
            (names.many_subject(names.call_all_subject(app)), self._on_any, ""),
        ):
            self._subscriptions.append(await bus.subscribe(subject, on_message, queue=group, direct=True))
        await self._answer(names.call_node_subject(app, self._node), self._on_node)
        await self._answer(*self._route_of_all(), queue)
        if not self._handlers:
            await self._answer(names.call_leader_subject(app), self._on_any, queue)
        else:
            await self._micro.open()

    async def _answer(self, subject: str, on_message: Callable[[Message], None], queue: str = "") -> None:
        self._subscriptions.append(await self._subscribe(subject, on_message, queue))

    async def _subscribe(
        self, subject: str, on_message: Callable[[Message], None], queue: str = ""
    ) -> Subscription:
        """For calls with one answer, and for those with many."""
        both = (subject, self._names.many_subject(subject))
        subscribe = functools.partial(self._bus.subscribe, queue=queue, direct=True)
        return Together([await subscribe(each, on_message) for each in both])

    def _route_of_all(self) -> tuple[str, Callable[[Message], None]]:
        """What every instance answers, as one queue group."""
        return self._names.call_any_subject(self._app), self._on_any

    async def close(self) -> None:
        """Answer no more. The active section has ended before; what else runs is cancelled."""
        self._handlers.is_served = False
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        self._subscriptions.clear()
        await self._micro.close()
        self._over = _NEVER_AGAIN
        self._look_at_held()
        for call in list(self._running.values()):
            call.cancel()
        if self._running:
            await asyncio.wait(set(self._running), timeout=CANCEL_SECONDS)
        self._deadlines.close()

    # --- with the section

    async def begin(self, epoch: int, active: Any) -> None:
        """From now on calls to the leader run, in the section of *epoch*."""
        self._active, self._epoch = active, epoch
        subject = self._route_of_section()
        self._leader_subscription = await self._subscribe(subject, self._on_leader_call)
        self._look_at_held()

    def _route_of_section(self) -> str:
        """What is answered in the section alone."""
        return self._names.call_leader_subject(self._app)

    async def end(self, *, graceful: bool) -> None:
        """See SectionCalls: what runs has DRAIN_SECONDS to end, if *graceful*.

        Raises HookFailed if a handler does not end: then the section has not ended.
        """
        epoch = self._epoch or self._draining
        if self._epoch:
            self._draining, self._epoch = self._epoch, 0
        self._over = max(self._over, epoch)
        self._look_at_held()
        for call in self._running.values():
            if call.section and call.stream is not None:
                call.cancel()  # it may go on for ever
        try:
            if graceful and (tasks := self._in_section()):
                await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
        finally:
            self._draining = 0
        await self._end_leader_subscription()
        for task in self._in_section():
            self._running[task].cancel()
        if tasks := self._in_section():
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        if left := self._in_section():
            names = ", ".join(sorted({task.get_name() for task in left}))
            problem = f"{names}: does not end, {CANCEL_SECONDS:g} s after it was cancelled"
            raise HookFailed(self._app, "call handler", problem)
        self._active = None

    def _in_section(self) -> set[asyncio.Task[None]]:
        return {task for task, call in self._running.items() if call.section}

    async def _end_leader_subscription(self) -> None:
        subscription, self._leader_subscription = self._leader_subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    def on_leader(self, node: str | None, epoch: int) -> None:
        """The leader key says that *node* leads under *epoch*; None: that nobody does since."""
        self._leading = wire.Leading(node or "", epoch, self._handlers.idempotent)
        if node != self._node:
            self._over = max(self._over, epoch)
            self._look_at_held()

    # --- what comes

    def _on_leader_call(self, message: Message) -> None:
        self._consider(IncomingCall(message, to_leader=True, node_route=False))

    def _on_node(self, message: Message) -> None:
        self._consider(IncomingCall(message, to_leader=False, node_route=True))

    def _on_any(self, message: Message) -> None:
        self._consider(IncomingCall(message, to_leader=False, node_route=False))

    def _on_who(self, message: Message) -> None:
        leading = msgspec.structs.replace(self._leading, nodes=self.instances())
        self._send(message, encode(leading, wire.JSON), {})

    def _on_cancel(self, message: Message) -> None:
        call_id = message.data.decode(errors="replace")
        call = self._by_id.get(call_id)
        if call is not None:
            call.cancel()
            return
        for held in self._held:
            if call_id and held.call_id == call_id:
                self._held.remove(held)
                self._refuse(held, "interrupted", "it was cancelled before it was begun")
                return

    def _on_flow(self, message: Message) -> None:
        call_id, _, total = message.data[:100].decode(errors="replace").partition(";")
        call = self._by_id.get(call_id)
        if call is not None and call.stream is not None and total.isdecimal():
            call.stream.grant(int(total[:18]))

    def _consider(self, call: IncomingCall) -> None:
        """Begin it, hold it, or say why not."""
        handler = self._handlers.by_name.get(call.method)
        if handler is None:
            self._refuse(call, *self._unknown(call.method))
        elif call.epoch is not None:
            if self._epoch and self._epoch >= call.epoch:
                self._begin_call(call, handler)
            elif call.epoch <= self._over or not call.node_route:
                self._refuse(call, wire.MOVED, f"node {self._node} does not lead app {self._app} (any more)")
            else:
                self._hold(call)
        elif self._epoch or handler.anywhere:
            self._begin_call(call, handler)
        else:
            self._refuse(call, *self._passive(call.method, node_route=call.node_route))

    def _passive(self, method: str, *, node_route: bool) -> tuple[str, str]:
        """Code and message for a call that only an active instance answers, and this one is not."""
        problem = f"only the active instance answers {method}, and node {self._node} is not active"
        return "wrong-route", f"{problem}; call it with to=Leader"

    def _unknown(self, method: str) -> tuple[str, str]:
        if not self._handlers:
            return "no-handlers", f"app {self._app} answers no calls; declare some with @app.handle(name)"
        known = ", ".join(sorted(self._handlers.by_name))
        return "unknown-method", f"app {self._app} has no method {method}; it has: {known}"

    def _hold(self, call: IncomingCall) -> None:
        if len(self._held) >= MAX_HELD:
            now = system.now()
            self._held = deque(held for held in self._held if held.deadline > now)
        if len(self._held) >= MAX_HELD:
            self._refuse(call, "busy", f"{MAX_HELD} calls wait for node {self._node} to become active")
        else:
            self._held.append(call)

    def _look_at_held(self) -> None:
        held, self._held = self._held, deque()
        now = system.now()
        for call in held:
            if call.deadline > now:
                self._consider(call)

    # --- one call

    def _begin_call(self, call: IncomingCall, handler: Handler) -> None:
        if handler.running >= handler.concurrency:
            problem = f"{handler.concurrency} calls of {handler.name} run on node {self._node} already"
            self._refuse(call, "busy", problem)
            return
        if handler.is_stream != bool(call.window and call.call_id):
            how = "with a stream: use api.stream()" if handler.is_stream else "once: use api.call()"
            self._refuse(call, "wrong-kind", f"{handler.name} answers {how}")
            return
        content_type = call.content_type
        if content_type is None:
            problem = f"content type {call.message.headers.get(wire.CONTENT_TYPE)!r} is not known"
            self._refuse(call, "content-type", f"{problem}; use application/json or application/msgpack")
            return
        request = None
        if handler.takes_request:
            try:
                request = handler.shape.decode(call.message.data or b"null", content_type)
            except ContentError as error:
                code = "too-deep" if error.too_deep else "wrong-type"
                self._refuse(call, code, f"the request: {error}", error.path)
                return
        handler.running += 1
        handler.requests += 1
        call.section = self._epoch
        work = self._run(call, handler, request, content_type)
        call.task = task = self._loop.create_task(work, name=handler.task_name)
        self._running[task] = call
        if call.call_id:
            self._by_id[call.call_id] = call
        if handler.is_stream:
            self._open_stream(call, content_type)
        else:
            call.slot = self._deadlines.add(call, call.deadline - system.now())

    def _open_stream(self, call: IncomingCall, content_type: str) -> None:
        def send(data: bytes, headers: dict[str, str]) -> None:
            self._send(call.message, data, headers, call.section)

        def check() -> None:
            call.check()
            if call.section and call.section not in (self._epoch, self._draining):
                raise NotActive(self._app)

        call.deadline = math.inf
        call.stream = OutgoingStream(
            call.window,
            content_type,
            most_bytes=self._bus.max_payload - HEADER_ROOM_BYTES,
            send=send,
            check=check,
            on_silence=call.expire,
        )
        call.stream.begin()

    def _ended(self, call: IncomingCall, handler: Handler) -> None:
        self._deadlines.remove(call, call.slot)
        if call.stream is not None:
            call.stream.close()
        handler.running -= 1
        assert call.task is not None  # this runs in it
        self._running.pop(call.task, None)
        call.task = None
        if self._by_id.get(call.call_id) is call:  # and not a later try of the same call
            del self._by_id[call.call_id]

    async def _run(self, call: IncomingCall, handler: Handler, request: Any, content_type: str) -> None:
        epoch = call.section
        active = self._active if epoch else None
        context = CallContext(
            self._app,
            self._node,
            handler.name,
            call.call_id,
            call.caller,
            call.message.headers,
            call.deadline,
            epoch,
            active,
            active.kv if active is not None else self._kv,
        )
        context.stream = call.stream
        CURRENT.set(context)
        began = time.perf_counter_ns()
        try:
            call.begin()
            if tracer() is None:
                answer = await handler.call(request, context)
            else:
                answer = await traced(handler.call, request, context)
            if epoch and epoch not in (self._epoch, self._draining):
                raise NotActive(self._app)
            data = encode(answer, content_type) if call.stream is None else b""
            if len(data) > self._bus.max_payload - HEADER_ROOM_BYTES:
                raise CallError("too-large", f"the answer has {len(data)} bytes, which fit into no message")
            headers = {wire.CONTENT_TYPE: content_type} if content_type != wire.JSON else {}
        except BaseException as error:
            problem = self._problem(handler, call, error, epoch)
            data, headers = wire.refusal(problem, self._bus.max_payload - HEADER_ROOM_BYTES)
            handler.errors += 1
            handler.last_error = f"{problem.code}: {problem.message}"
            if isinstance(error, asyncio.CancelledError):
                self._send_end(call, data, headers)
                raise
        finally:
            handler.processing_ns += time.perf_counter_ns() - began
            self._ended(call, handler)
        self._send_end(call, data, headers)

    def _send_end(self, call: IncomingCall, data: bytes, headers: dict[str, str]) -> None:
        if call.stream is not None:
            headers[wire.STREAM] = call.stream.end_header()
        self._send(call.message, data, headers, call.section)

    def _problem(
        self, handler: Handler, call: IncomingCall, error: BaseException, epoch: int
    ) -> wire.Problem:
        """What the caller is told: never a traceback. That is in the log."""
        what = f"{self._app}.{handler.name} (call {call.call_id or '?'})"
        match error:
            case CallError():
                return wire.Problem(error.code, error.message, error.path, True, error.details)
            case asyncio.CancelledError() if call.expired:
                log.info("%s overran its caller's deadline and was cancelled", what)
                return wire.Problem("deadline", "the handler overran the deadline", started=True)
            case asyncio.CancelledError() | NotActive() | Fenced() | SessionLost():
                log.info("%s was interrupted on epoch %d: %s", what, epoch, error)
                problem = f"node {self._node} stopped it before its end"
                return wire.Problem("interrupted", problem, started=True)
            case ContentError():
                log.error("%s: its answer cannot be sent: %s", what, error)
                code = "too-deep" if error.too_deep else "failed"
                return wire.Problem(code, f"the answer cannot be sent: {error}", error.path, True)
            case _:
                log.error("%s failed", what, exc_info=error)
                where = f"the log of node {self._node} says more of call {call.call_id or '?'}"
                return wire.Problem("failed", f"the handler failed; {where}", started=True)

    def _turn_away(self, message: Message, code: str, problem: str) -> None:
        """Whatever it asks for: answer that it was not begun."""
        self._refuse(IncomingCall(message, to_leader=False, node_route=False), code, problem)

    def _refuse(self, call: IncomingCall, code: str, message: str, path: str = "") -> None:
        """Answer that it was not begun."""
        handler = self._handlers.by_name.get(call.method)
        if handler is not None and code != wire.MOVED:
            handler.requests += 1
            handler.errors += 1
            handler.last_error = f"{code}: {message}"
        problem = wire.Problem(code, message, path)
        data, headers = wire.refusal(problem, self._bus.max_payload - HEADER_ROOM_BYTES)
        self._send(call.message, data, headers)

    def _send(self, message: Message, data: bytes, headers: dict[str, str], epoch: int = 0) -> None:
        if not self._names.takes_answers(message.reply):
            return
        headers[wire.ANSWER] = f"{self._node};{epoch}"
        try:
            self._bus.send(message.reply, data, headers)
        except (PhalanxError, ValueError) as error:
            log.warning("an answer of %s could not be sent: %s", self._app, error)
