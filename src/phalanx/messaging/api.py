"""The calls of one app, as other apps and clients make them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any as Value
from typing import TypeVar

from phalanx.errors import CallError, ConfigError
from phalanx.messaging.call_wire import MAX_WINDOW
from phalanx.messaging.calling import Caller
from phalanx.messaging.content import CONTENT_TYPES, JSON
from phalanx.messaging.methods import check_method
from phalanx.messaging.middleware import CallerMiddleware, OutgoingCall, checked, through
from phalanx.messaging.routes import Any, Default, Route
from phalanx.messaging.stubs import CallOptions, make_stub
from phalanx.names import RESERVED_APPS
from phalanx.observe.tracing import call_span, stream_span
from phalanx.types import is_dns_label

T = TypeVar("T")

_WHATEVER: Value = Value

MAX_TIMEOUT_SECONDS = 86400.0


def check_arguments(method: str, to: Route, timeout: float, content_type: str) -> None:
    """Raises ConfigError for what no call can be made with."""
    if isinstance(timeout, bool) or not 0.001 <= timeout <= MAX_TIMEOUT_SECONDS:
        raise ConfigError("timeout", timeout, "out of range", "choose 0.001 to 86400 seconds")
    if not isinstance(to, Route):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError("to", to, "no route", "use phalanx.Leader, Any, Node(name) or Key(key)")
    if content_type not in CONTENT_TYPES:
        raise ConfigError("content_type", content_type, "not known", f"use {' or '.join(CONTENT_TYPES)}")
    check_method("method", method)


class Api:
    """The calls of one app, from another. Made by ``platform.api("orders")`` or ``client.api("orders")``."""

    def __init__(self, app: str, caller: Callable[[], Caller]) -> None:
        if not isinstance(app, str) or not is_dns_label(app) or app in RESERVED_APPS:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError("api", app, "no name of an app", "use 1-63 of a-z, 0-9 and inner hyphens")
        self.app, self._caller = app, caller
        self._middleware: tuple[CallerMiddleware, ...] = ()

    def using(self, *middleware: CallerMiddleware) -> Api:
        """The same calls, made through *middleware* too; the first is the outermost. This one stays as it is.

        Each is ``async def m(call: OutgoingCall, proceed)``. Raises ConfigError for what cannot be one.
        """
        inside = tuple(checked("using", each) for each in middleware)
        api = Api(self.app, self._caller)
        api._middleware = (*self._middleware, *inside)
        return api

    def stub(
        self,
        interface: type[T],
        *,
        to: Route | Callable[..., Route] | None = None,
        timeout: float | None = None,
        idempotent: bool | None = None,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """An object with the async methods of *interface*, a Protocol or a class: each one calls the app.

        The options are the defaults of its calls; what ``@method`` says of a method goes before them, and
        :func:`phalanx.with_options` before both. Without any: as for :meth:`call`. All is checked here:
        raises ConfigError for a method that could not be called.
        """
        defaults = CallOptions(to, timeout, idempotent, content_type, headers)
        return make_stub(
            self.app, self.call, self.stream, check_arguments, interface, defaults, is_async=True
        )

    async def _call_inside(self, returns: Value, call: OutgoingCall) -> Value:
        """The call, made through the middleware."""
        plain = Api(self.app, self._caller)

        def proceed() -> Awaitable[Value]:
            return plain.call(
                call.method,
                call.request,
                returns=returns,
                to=call.to,
                timeout=call.timeout,
                idempotent=call.idempotent,
                content_type=call.content_type,
                headers=call.headers,
            )

        return await through(self._middleware, call, proceed)

    def stream(
        self,
        method: str,
        request: object = None,
        *,
        returns: type[T] = _WHATEVER,
        to: Route = Default,
        timeout: float = 5.0,
        window: int = 64,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[T]:
        """Call *method*, whose handler yields: its items, one after the other. Use it in ``async for``;
        whoever leaves that early closes it, with ``contextlib.aclosing`` at once.

        *timeout*: how long it may take until the handler has begun; how long it goes on is not bounded,
        except by the deadline of a handler in which this runs. *window*: how many items may be on their way,
        1 to 1024; the handler makes no more before they are taken. The rest as for :meth:`call`.

        Raises CallError and its kinds where the next item is waited for: OutcomeUnknown as soon as it is
        known that no more will come, because the leader has changed, the connection broke or the handler is
        silent. Nothing is tried again once the handler has begun.
        """
        check_arguments(method, to, timeout, content_type)
        if isinstance(window, bool) or not 1 <= window <= MAX_WINDOW:
            raise ConfigError("window", window, "out of range", f"choose 1 to {MAX_WINDOW}")
        outgoing = OutgoingCall(
            self.app,
            method,
            request,
            to=to,
            timeout=timeout,
            idempotent=None,
            content_type=content_type,
            headers=headers,
        )
        return self._stream(outgoing, returns, window)

    async def _stream(self, call: OutgoingCall, returns: Value, window: int) -> AsyncGenerator[Value]:
        async def proceed() -> AsyncGenerator[Value]:
            return self._caller().stream(
                self.app,
                call.method,
                call.request,
                returns=returns,
                to=call.to,
                timeout=call.timeout,
                window=window,
                content_type=call.content_type,
                headers=call.headers,
            )

        with stream_span(self.app, call.method, call.headers, to=str(call.to)):
            items = await through(self._middleware, call, proceed)
            async with contextlib.aclosing(items):
                async for item in items:
                    yield item

    async def broadcast(
        self,
        method: str,
        request: object = None,
        *,
        returns: type[T] = _WHATEVER,
        timeout: float = 5.0,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, T | CallError]:
        """Call *method* on all nodes that run the app; the answer, or the error, of each, by node.

        It ends when all have answered: those that an instance knows of, and that are alive. One that has not
        within *timeout* seconds is there with CallTimeout (``deadline``). Standbys refuse methods that are
        not ``anywhere`` (``wrong-route``). Nothing is tried again.

        Raises NoInstance if none is there, UnknownApp, and ConfigError and CallError for what cannot be sent.
        If this is cancelled, so are the handlers.
        """
        call = OutgoingCall(
            self.app,
            method,
            request,
            to=Any,
            timeout=timeout,
            idempotent=None,
            content_type=content_type,
            headers=headers,
        )

        async def proceed() -> dict[str, T | CallError]:
            check_arguments(call.method, Any, call.timeout, call.content_type)
            with call_span(self.app, call.method, call.headers, to="all"):
                return await self._caller().broadcast(
                    self.app,
                    call.method,
                    call.request,
                    returns=returns,
                    timeout=call.timeout,
                    content_type=call.content_type,
                    headers=call.headers,
                )

        return await through(self._middleware, call, proceed)

    async def call(
        self,
        method: str,
        request: object = None,
        *,
        returns: type[T] = _WHATEVER,
        to: Route = Default,
        timeout: float = 5.0,
        idempotent: bool | None = None,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Call *method* with *request*; its answer, as *returns* (any type of msgspec's; pydantic models).

        *to*: Leader (waits through a failover), Any, Node("n2"), Key("eva") (the owner in a ring); left out:
        Leader, or Any for a pool. *timeout*: seconds, 0.001 to 86400; a call made inside of a handler never
        waits longer than that handler's caller does. *idempotent*: whether it may be made again although it
        may have been carried out; None: as its handler was declared. *headers* reach the handler as
        ``ctx.headers``.

        Raises CallError and its kinds, ConfigError for arguments that are wrong. If this is cancelled, so is
        the handler.
        """
        if self._middleware:
            outgoing = OutgoingCall(
                self.app,
                method,
                request,
                to=to,
                timeout=timeout,
                idempotent=idempotent,
                content_type=content_type,
                headers=headers,
            )
            return await self._call_inside(returns, outgoing)
        check_arguments(method, to, timeout, content_type)
        return await self._caller().call(
            self.app,
            method,
            request,
            returns=returns,
            to=to,
            timeout=timeout,
            idempotent=idempotent,
            content_type=content_type,
            headers=headers,
        )
