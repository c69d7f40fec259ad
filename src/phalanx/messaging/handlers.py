"""The handlers that an app declares, and what each has done."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Awaitable, Callable
from typing import Any

from phalanx.errors import ConfigError
from phalanx.messaging.content import Shape, shape_of
from phalanx.messaging.context import CallContext
from phalanx.messaging.methods import check_method
from phalanx.messaging.middleware import HandlerMiddleware, around, checked

DEFAULT_CONCURRENCY = 256
"""Calls of one handler that run at a time on one node, unless it says otherwise."""

MAX_CONCURRENCY = 65536

Function = Callable[..., Any]
"""An async function, or one that is an async generator."""


class Handler:
    """One declared method of an app. ``running``: calls under way on this node. The rest is statistics."""

    def __init__(
        self,
        app: str,
        name: str,
        function: Function,
        *,
        idempotent: bool,
        anywhere: bool,
        concurrency: int,
        request: Any = None,
    ) -> None:
        self.name, self.function = name, function
        self.task_name = f"call {app}.{name}"
        self.idempotent, self.anywhere, self.concurrency = idempotent, anywhere, concurrency
        key = f"apps.{app}.handle({name!r})"
        self.takes_request, self.takes_context, kind = _signature(key, function, request)
        try:
            self.shape: Shape = shape_of(kind)
        except TypeError as error:
            remedy = "use a msgspec struct, a dataclass, a pydantic model or a plain type"
            raise ConfigError(key, kind, str(error), remedy) from None
        self.call: Callable[[Any, CallContext], Awaitable[Any]] = self._call
        """Begins one call."""
        self.is_stream = inspect.isasyncgenfunction(function)
        """Whether it yields items instead of returning an answer."""
        self.running = 0
        self.requests = self.errors = self.processing_ns = 0
        self.last_error = ""

    def _call(self, request: Any, context: CallContext) -> Awaitable[Any]:
        if self.takes_request:
            begun = self.function(request, context) if self.takes_context else self.function(request)
        else:
            begun = self.function(context) if self.takes_context else self.function()
        return context.stream.pump(begun) if self.is_stream else begun

    def put_inside(self, middleware: tuple[HandlerMiddleware, ...]) -> None:
        """From now on calls go through *middleware*."""
        self.call = around(middleware, self._call)


class Handlers:
    """Those of one app, by method."""

    def __init__(self, app: str) -> None:
        self._app = app
        self.by_name: dict[str, Handler] = {}
        self._middleware: tuple[HandlerMiddleware, ...] = ()
        self.is_served = False
        """Whether they are answered already: then no more can be declared."""

    def add(
        self,
        name: str,
        function: Function,
        *,
        idempotent: bool = False,
        anywhere: bool = False,
        concurrency: int = DEFAULT_CONCURRENCY,
        request: Any = None,
    ) -> None:
        """Declare one. Raises ConfigError for a wrong name, a second one of that name, a function that is not
        async or has other parameters than (request, ctx), a type that cannot be sent."""
        key = f"apps.{self._app}.handle"
        check_method(key, name)
        if self.is_served:
            raise ConfigError(key, name, "the platform runs already", "declare handlers before")
        if name in self.by_name:
            raise ConfigError(key, name, "the app has this handler already", "choose another name")
        if isinstance(concurrency, bool) or not 1 <= concurrency <= MAX_CONCURRENCY:
            raise ConfigError(
                f"{key}({name!r}).concurrency", concurrency, "out of range", "choose 1 to 65536"
            )
        self.by_name[name] = Handler(
            self._app,
            name,
            function,
            idempotent=idempotent,
            anywhere=anywhere,
            concurrency=concurrency,
            request=request,
        )

    def add_middleware(self, middleware: HandlerMiddleware) -> None:
        """Declare one more, inside of those before it. Raises ConfigError."""
        key = f"apps.{self._app}.middleware"
        if self.is_served:
            raise ConfigError(key, middleware, "the platform runs already", "declare middleware before")
        self._middleware = (*self._middleware, checked(key, middleware))

    def serve(self) -> None:
        """They are about to be answered: all is declared."""
        self.is_served = True
        for handler in self.by_name.values():
            handler.put_inside(self._middleware)

    def __bool__(self) -> bool:
        return bool(self.by_name)

    @property
    def idempotent(self) -> tuple[str, ...]:
        """The methods that may be repeated."""
        return tuple(h.name for h in self.by_name.values() if h.idempotent)


def _signature(key: str, function: Function, request: Any) -> tuple[bool, bool, Any]:
    """Whether it takes a request, and a context; the type of the request."""
    if not inspect.iscoroutinefunction(function) and not inspect.isasyncgenfunction(function):
        remedy = "make it async; for what blocks use asyncio.to_thread inside, and wait for its end"
        raise ConfigError(key, function, "not an async function", remedy)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    every = list(inspect.signature(function).parameters.values())
    given = [p for p in every if p.kind in kinds]
    needed = [
        p
        for p in every
        if p not in given and p.default is inspect.Parameter.empty and p.kind is p.KEYWORD_ONLY
    ]
    if len(given) > 2 or needed:
        raise ConfigError(key, function, "has other parameters", "a handler takes (request, ctx)")
    only_context = len(given) == 1 and given[0].name in ("ctx", "context")
    takes_request = bool(given) and not only_context
    takes_context = len(given) == 2 or only_context
    if request is not None:
        return takes_request, takes_context, request
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        remedy = "declare it at the module's top, or give it: handle(..., request=Type)"
        raise ConfigError(key, function, f"its types cannot be found ({error})", remedy) from None
    return takes_request, takes_context, hints.get(given[0].name, Any) if takes_request else Any
