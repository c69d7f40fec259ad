"""What runs around calls: on the caller's side around the whole call, on the other around the handler.

The first one declared is the outermost. Each gets what it runs around, and ``proceed``: awaiting it does the
rest and gives the answer. It may answer itself instead, refuse with a CallError, or look at what is raised.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from phalanx.errors import ConfigError
from phalanx.messaging.context import CallContext
from phalanx.messaging.routes import Route
from phalanx.observe.tracing import handler_span

Proceed = Callable[[], Awaitable[Any]]

HandlerMiddleware = Callable[[CallContext, Proceed], Awaitable[Any]]
"""``async def m(call: CallContext, proceed): return await proceed()``."""


class OutgoingCall:
    """A call that is about to be made. What a middleware changes here before ``proceed`` is what is sent.

    ``request``: the value, not yet encoded. ``headers``: its own copy. The rest as for :meth:`Api.call`.
    """

    __slots__ = ("app", "content_type", "headers", "idempotent", "method", "request", "timeout", "to")

    def __init__(
        self,
        app: str,
        method: str,
        request: object,
        *,
        to: Route,
        timeout: float,
        idempotent: bool | None,
        content_type: str,
        headers: Mapping[str, str] | None,
    ) -> None:
        self.app, self.method, self.request = app, method, request
        self.to, self.timeout, self.idempotent = to, timeout, idempotent
        self.content_type, self.headers = content_type, dict(headers or {})


CallerMiddleware = Callable[[OutgoingCall, Proceed], Awaitable[Any]]
"""``async def m(call: OutgoingCall, proceed): return await proceed()``; ``proceed`` may be called again."""


def checked(key: str, middleware: Any) -> Any:
    """*middleware*, if it can be one. Raises ConfigError, for *key*."""
    function: Any = middleware if inspect.isroutine(middleware) else getattr(middleware, "__call__", None)  # noqa: B004
    remedy = "give an async function of (call, proceed)"
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(key, middleware, "not an async function", remedy)
    try:
        inspect.signature(middleware).bind(None, None)
    except TypeError as error:
        raise ConfigError(key, middleware, f"has other parameters ({error})", remedy) from None
    return middleware


async def through(
    middleware: tuple[Callable[[Any, Proceed], Awaitable[Any]], ...], call: Any, last: Proceed
) -> Any:
    """Run *last* inside of all of *middleware*."""

    def proceed_from(position: int) -> Awaitable[Any]:
        if position == len(middleware):
            return last()
        return middleware[position](call, lambda: proceed_from(position + 1))

    return await proceed_from(0)


def around(
    middleware: tuple[HandlerMiddleware, ...], handler: Callable[[Any, CallContext], Awaitable[Any]]
) -> Callable[[Any, CallContext], Awaitable[Any]]:
    """*handler*, with *middleware* around it; itself if there is none."""
    if not middleware:
        return handler

    def call(request: Any, context: CallContext) -> Awaitable[Any]:
        return through(middleware, context, lambda: handler(request, context))

    return call


async def traced(
    handler: Callable[[Any, CallContext], Awaitable[Any]], request: Any, context: CallContext
) -> Any:
    """Run *handler* in a span, which goes on with the trace of its caller."""
    said: dict[str, str | int] = {"node": context.node, "epoch": context.epoch, "call_id": context.call_id}
    with handler_span(context.app, context.method, context.headers, **said):
        return await handler(request, context)
