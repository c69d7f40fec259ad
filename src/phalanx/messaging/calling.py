"""Calls to apps, from wherever there is a connection: routing, deadlines, and what is tried again.

What is tried again, until the deadline: whatever provably was not begun (nobody there, "moved", "busy", not
connected), and calls of methods that are declared idempotent also when they may have been.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any as Value

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.decide.partition import partition_of
from phalanx.errors import (
    BusError,
    BusTimeout,
    BusUnavailable,
    CallError,
    CallTimeout,
    NoInstance,
    NoLeader,
    OutcomeUnknown,
    PhalanxError,
    TooDeep,
    TooLarge,
    UnknownApp,
    WrongRoute,
    WrongType,
)
from phalanx.messaging import call_wire as wire
from phalanx.messaging.content import JSON, ContentError, encode, shape_of
from phalanx.messaging.context import callers_deadline
from phalanx.messaging.gathering import Gathering
from phalanx.messaging.leading import MOVED_SECONDS, Followed, InFlight, LeaderView
from phalanx.messaging.ring_view import RingView
from phalanx.messaging.routes import Any, Default, Key, Leader, Node, Route
from phalanx.messaging.serving import HEADER_ROOM_BYTES
from phalanx.messaging.stream_in import IncomingStream
from phalanx.messaging.tries import OutgoingTries
from phalanx.names import Names
from phalanx.observe.tracing import call_span, inject, tracer
from phalanx.ports import Bus, Message

log = logging.getLogger("phalanx.calls")

OWNER_SECONDS = 0.1
"""The longest delay between tries at the owner of a partition, while it changes hands."""

KNOWN_APP_SECONDS = 0.5
"""How long the look may take whether the platform has such an app."""


class Caller:
    """Makes calls over one connection. ``name``: what it calls itself. End it with :meth:`close`."""

    def __init__(self, bus: Callable[[], Bus], names: Names, name: str) -> None:
        self._bus, self._names, self._name = bus, names, name
        self._views: dict[str, LeaderView] = {}
        self._rings: dict[str, RingView] = {}
        self._opening = asyncio.Lock()
        self._prefix, self._numbers = secrets.token_hex(6), itertools.count(1)
        self._closed = asyncio.Event()
        self._known: set[str] = set()

    async def close(self) -> None:
        """End what is followed. Calls under way, and those that wait, fail at once."""
        self._closed.set()
        views = (*self._views.values(), *self._rings.values())
        self._views, self._rings = {}, {}
        for view in views:
            view.end_calls()
            await view.close()

    async def call(
        self,
        app: str,
        method: str,
        request: object,
        *,
        returns: Value,
        to: Route,
        timeout: float,
        idempotent: bool | None,
        content_type: str,
        headers: Mapping[str, str] | None,
        is_traced: bool = False,
    ) -> Value:
        """See :meth:`Api.call`. *is_traced*: inside of its span already."""
        if tracer() is not None and not is_traced:
            carried = dict(headers or {})
            with call_span(app, method, carried, to=str(to)):
                return await self.call(
                    app,
                    method,
                    request,
                    returns=returns,
                    to=to,
                    timeout=timeout,
                    idempotent=idempotent,
                    content_type=content_type,
                    headers=carried,
                    is_traced=True,
                )
        call = self._new(app, method, request, timeout, idempotent, content_type, headers)
        try:
            view = self._views.get(app) or await self._view(app)
            answer = None
            node, epoch = view.node, view.epoch
            if node and (to is Default or to is Leader) and (left := call.deadline - system.now()) > 0:
                # The first round of _to_leader, without it: it is the only one of nearly all calls.
                subject = self._names.call_node_subject(app, node, method)
                answer = await self._try(call, view, subject, left, epoch)
                if answer is None and view.node == node and view.epoch == epoch:
                    await view.wait(call.deadline, call.delay())
            if answer is None:
                answer = await self._answer(call, view, to)
        except asyncio.CancelledError:
            self._cancel(call)
            raise
        return self._decoded(call, answer, returns)

    async def stream(
        self,
        app: str,
        method: str,
        request: object,
        *,
        returns: Value,
        to: Route,
        timeout: float,
        window: int,
        content_type: str,
        headers: Mapping[str, str] | None,
    ) -> AsyncGenerator[Value]:
        """See :meth:`Api.stream`."""
        until = callers_deadline()
        call = self._new(app, method, request, timeout, None, content_type, headers)
        call.headers[wire.STREAM] = str(window)
        incoming = IncomingStream(self._bus(), self._names, app, method, call.id, window)
        call.ask = incoming.ask
        try:
            await self._answer(call, self._views.get(app) or await self._view(app), to)
            assert call.followed is not None  # by the try that was answered
            incoming.begin(call.followed, until - system.now())
            while (item := await incoming.next()) is not None:
                yield self._decoded(call, item, returns)
        finally:
            await incoming.close()

    async def broadcast(
        self,
        app: str,
        method: str,
        request: object,
        *,
        returns: Value,
        timeout: float,
        content_type: str,
        headers: Mapping[str, str] | None,
    ) -> dict[str, Value]:
        """See :meth:`Api.broadcast`."""
        call = self._new(app, method, request, timeout, None, content_type, headers)
        call.headers[wire.CALL] = wire.call_header(call.id, call.deadline - system.now(), None, self._name)
        inject(call.headers)
        view = self._views.get(app) or await self._view(app)
        self._check_open(call, view)
        gathering = Gathering(self._bus(), view)
        try:
            subject = self._names.many_subject(self._names.call_all_subject(app, method))
            await gathering.send(subject, call.data, call.headers)
            expected = await gathering.wait(call.deadline)
        except asyncio.CancelledError:
            self._cancel(call)
            raise
        except BusError as error:
            raise call.failed(NoInstance, "no-instance", str(error)) from error
        finally:
            await gathering.close()
        if gathering.is_ended:
            self._cancel(call)
            call.may_have_begun = True
            self._check_open(call, view)
        if not gathering.answers:
            await self._check_known(call, view)
        if not gathering.answers and not expected:
            raise call.failed(NoInstance, "no-instance", "no instance was there")
        call.may_have_begun = True
        silent = call.failed(CallTimeout, "deadline", "no answer before the deadline")
        answers = gathering.answers
        return {
            node: self._one_of_many(call, answers[node], returns) if node in answers else silent
            for node in sorted({*expected, *answers})
        }

    def _one_of_many(self, call: OutgoingTries, answer: Message, returns: Value) -> Value | CallError:
        problem = wire.problem_of(answer.data, answer.headers)
        if problem is not None:
            return wire.error_of(problem, call.app, call.method, wire.answered_by(answer.headers)[0])
        try:
            return self._decoded(call, answer, returns)
        except CallError as error:
            return error

    def _new(
        self,
        app: str,
        method: str,
        request: object,
        timeout: float,
        idempotent: bool | None,
        content_type: str,
        headers: Mapping[str, str] | None,
    ) -> OutgoingTries:
        deadline = min(system.now() + timeout, callers_deadline())
        call = OutgoingTries(app, method, b"", content_type, deadline, idempotent)
        call.data = self._encoded(call, request)
        call.id = f"{self._prefix}-{next(self._numbers)}"
        call.headers = dict(headers) if headers else {}
        if content_type != JSON:
            call.headers[wire.CONTENT_TYPE] = content_type
        return call

    async def _answer(self, call: OutgoingTries, view: LeaderView, to: Route) -> Message:
        if to is Leader or to is Default:
            return await self._to_leader(call, view, to)
        if isinstance(to, Key):
            return await self._to_key(call, view, to)
        return await self._to(call, view, to)

    def _encoded(self, call: OutgoingTries, request: object) -> bytes:
        try:
            data = encode(request, call.content_type)
        except ContentError as error:
            kind, code = (TooDeep, "too-deep") if error.too_deep else (WrongType, "wrong-type")
            raise call.failed(kind, code, f"the request: {error}") from error
        if len(data) > (most := self._bus().max_payload - HEADER_ROOM_BYTES):
            problem = (
                f"the request has {len(data)} bytes, more than the {most} of a message; send a reference"
            )
            raise call.failed(TooLarge, "too-large", problem)
        return data

    def _decoded(self, call: OutgoingTries, answer: Message, returns: Value) -> Value:
        content_type = wire.content_type_of(answer.headers)
        path = "$"
        if content_type is None:
            problem = f"the answer has content type {answer.headers.get(wire.CONTENT_TYPE)!r}"
        else:
            try:
                return shape_of(returns).decode(answer.data, content_type)
            except ContentError as error:
                problem, path = f"the answer is not of the type asked for: {error}", error.path
        node = wire.answered_by(answer.headers)[0]
        raise WrongType(
            "wrong-type", problem, app=call.app, method=call.method, node=node, path=path, started=True
        )

    def _cancel(self, call: OutgoingTries) -> None:
        """Nobody waits for it any more: whoever runs it may end it."""
        try:
            self._bus().send(self._names.call_cancel_subject(call.app), call.id.encode())
        except PhalanxError as error:
            log.debug("cancelling call %s: %s", call.id, error)

    # --- who is there

    async def _view(self, app: str) -> LeaderView:
        async with self._opening:
            view = self._views.get(app)
            if view is None:
                view = LeaderView(self._bus(), self._names, app)
                await view.start()
                if self._closed.is_set():
                    await view.close()
                else:
                    self._views[app] = view
        return view

    def _check_open(self, call: OutgoingTries, view: Followed) -> None:
        """Raises what a call ends with that may not go on: its caller was closed, or there is no such app."""
        if self._closed.is_set():
            if call.may_have_begun:
                raise call.failed(OutcomeUnknown, "interrupted", "the client was closed")
            raise call.failed(NoInstance, "no-instance", "the client was closed")
        if view.is_closed:
            raise self._unknown(call)

    def _unknown(self, call: OutgoingTries) -> CallError:
        problem = f"platform {self._names.platform} has no app {call.app}; phalanx status lists them"
        return call.failed(UnknownApp, "unknown-app", problem)

    async def _check_known(self, call: OutgoingTries, view: LeaderView) -> None:
        """Nobody of the app is there: raises UnknownApp if there never was, as far as we may know that.

        Then *view* is dropped: names of no app, from whomever, must not add up.
        """
        if call.app in self._known:
            return
        bucket = self._names.platform_bucket
        subject = self._names.key_subject(bucket, self._names.app_key(call.app))
        left = min(KNOWN_APP_SECONDS, call.deadline - system.now())
        if left <= 0:
            return
        try:
            found = await self._bus().read(self._names.bucket_stream(bucket), subject, timeout=left)
        except BusError as error:
            log.debug("whether there is an app %s: %s", call.app, error)
            return
        if found is None or found.removed:
            if self._views.get(call.app) is view:
                del self._views[call.app]
                await view.close()
            raise self._unknown(call)
        self._known.add(call.app)

    # --- routes

    async def _to_leader(self, call: OutgoingTries, view: LeaderView, to: Route) -> Message:
        if not view.answered and not await view.ask(call.deadline):
            await self._check_known(call, view)
        while True:
            self._check_open(call, view)
            if view.is_pool:
                if to is Default:
                    return await self._to(call, view, Any)
                problem = f"app {call.app} is a pool, which has no leader; call it with to=Any"
                raise call.failed(WrongRoute, "wrong-route", problem)
            if view.partitions:
                problem = f"app {call.app} is a ring, which has no leader; call it with to=Key(key)"
                raise call.failed(WrongRoute, "wrong-route", problem)
            left = call.deadline - system.now()
            if left <= 0:
                raise self._too_late(call, NoLeader, "no-leader", "no leader before the deadline")
            node, epoch = view.node, view.epoch
            if not node:
                call.why = call.why or "no node leads"
                await view.wait(call.deadline)
                continue
            subject = self._names.call_node_subject(call.app, node, call.method)
            answer = await self._try(call, view, subject, left, epoch)
            if answer is not None:
                return answer
            if view.node == node and view.epoch == epoch:
                await view.wait(call.deadline, call.delay())

    async def _to_key(self, call: OutgoingTries, view: LeaderView, to: Key) -> Message:
        """To the owner of the key's partition: waits while that changes hands."""
        while not view.partitions:
            self._check_open(call, view)
            if not await view.ask(call.deadline):
                await self._check_known(call, view)
            if view.answered and not view.partitions:
                problem = f"app {call.app} is no ring, it has no owners of keys; call it with another route"
                raise call.failed(WrongRoute, "wrong-route", problem)
            if system.now() >= call.deadline:
                raise self._too_late(call, NoInstance, "no-instance", "no instance was there")
            await self._pause(call)
        number = partition_of(to.encoded, view.partitions)
        partition = (self._rings.get(call.app) or await self._ring(call.app, view)).of(number)
        subject = self._names.call_partition_subject(call.app, number, call.method)
        while (left := call.deadline - system.now()) > 0:
            self._check_open(call, view)
            answer = await self._try(call, partition, subject, left, partition.epoch)
            if answer is not None:
                return answer
            await self._pause(call)
        problem = f"nobody owned partition {number} before the deadline"
        raise self._too_late(call, NoInstance, "no-instance", problem)

    async def _ring(self, app: str, view: LeaderView) -> RingView:
        async with self._opening:
            ring = self._rings.get(app)
            if ring is None:
                ring = RingView(self._bus, self._names, app, view)
                await ring.start()
                if self._closed.is_set():
                    await ring.close()
                else:
                    self._rings[app] = ring
        return ring

    async def _pause(self, call: OutgoingTries) -> None:
        """Before the next try of a call to an owner, who may be a moment away."""
        await wait_at_most(self._closed, min(call.delay(), OWNER_SECONDS, call.deadline - system.now()))

    async def _to(self, call: OutgoingTries, view: LeaderView, to: Route) -> Message:
        names = self._names
        subject = names.call_any_subject(call.app, call.method)
        if isinstance(to, Node):
            subject = names.call_node_subject(call.app, to.node, call.method)
        if call.idempotent is None and not view.answered:
            await view.ask(call.deadline)
        while True:
            self._check_open(call, view)
            left = call.deadline - system.now()
            if left <= 0:
                what = f"{to} was not there" if isinstance(to, Node) else "no instance was ready"
                raise self._too_late(call, NoInstance, "no-instance", f"{what} before the deadline")
            answer = await self._try(call, view, subject, left, None)
            if answer is not None:
                return answer
            if not view.answered:
                await self._check_known(call, view)
            await wait_at_most(self._closed, min(call.delay(), call.deadline - system.now()))

    def _too_late(self, call: OutgoingTries, kind: type[CallError], code: str, message: str) -> CallError:
        if call.busy is not None and not call.may_have_begun:
            return call.busy
        if call.may_have_begun:
            return call.failed(CallTimeout, "deadline", "not answered before the deadline")
        return call.failed(kind, code, message)

    # --- one try

    async def _try(
        self, call: OutgoingTries, view: Followed, subject: str, left: float, epoch: int | None
    ) -> Message | None:
        """One request: its answer, or None if another one may be made. Raises CallError."""
        call.headers[wire.CALL] = wire.call_header(call.id, left, epoch, self._name)
        call.busy, call.followed = None, view
        patience = 0.0 if epoch is None or self._may_repeat(call, view) else MOVED_SECONDS
        under_way = InFlight(epoch, patience)
        view.in_flight.add(under_way)
        try:
            ask = call.ask or self._bus().request
            answer = await ask(subject, call.data, headers=call.headers, timeout=left)
        except BusUnavailable as error:
            call.why = error.description
            return None
        except BusTimeout as error:
            if system.now() >= call.deadline:
                call.may_have_begun = True
                raise call.failed(CallTimeout, "deadline", "no answer before the deadline") from error
            return self._interrupted(call, view, error.description)
        except BusError as error:
            return self._interrupted(call, view, error.description)
        except asyncio.CancelledError:
            if not under_way.has_ended():
                raise
            if self._closed.is_set():
                self._cancel(call)
                call.may_have_begun = True
                self._check_open(call, view)
            return self._interrupted(call, view, f"epoch {epoch} is over")
        finally:
            view.in_flight.discard(under_way)
            under_way.close()
        return self._judge(call, view, answer, epoch)

    def _judge(
        self, call: OutgoingTries, view: Followed, answer: Message, epoch: int | None
    ) -> Message | None:
        headers = answer.headers
        problem = wire.problem_of(answer.data, headers) if headers else None
        if problem is None or problem.started:
            given = wire.answered_by(headers)[1]
            if epoch is not None and 0 < given < view.epoch:
                return self._interrupted(call, view, f"the answer is of epoch {given}, which is over")
        if problem is None:
            return answer
        call.why = problem.message
        if problem.code == wire.MOVED:
            if epoch is not None:
                view.is_over(epoch)
            return None
        if problem.code == "interrupted":
            return self._interrupted(call, view, problem.message)
        error = wire.error_of(problem, call.app, call.method, wire.answered_by(headers)[0])
        if problem.code == "busy" and not problem.started:
            call.busy = error
            return None
        raise error

    def _interrupted(self, call: OutgoingTries, view: Followed, why: str) -> None:
        """A try that may have been carried out was broken off. Returns if it may be made again."""
        call.why, call.may_have_begun = why, True
        if not self._may_repeat(call, view):
            raise call.failed(OutcomeUnknown, "interrupted", "it may have been carried out or not")

    def _may_repeat(self, call: OutgoingTries, view: Followed) -> bool:
        return call.idempotent if call.idempotent is not None else call.method in view.idempotent
