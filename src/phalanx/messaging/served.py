"""An object whose methods answer calls: the other side of a stub."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec

from phalanx.errors import ConfigError
from phalanx.messaging.handlers import Handlers
from phalanx.messaging.interface import Method, declared_by, interface_of


def handle_all(handlers: Handlers, app: str, implementation: object, interface: type | None) -> None:
    """Declare a handler for each method; see :meth:`phalanx.App.handle_all`."""
    key = f"apps.{app}.handle_all"
    if inspect.isclass(implementation):
        raise ConfigError(
            key, implementation, "a class", f"give an object: handle_all({implementation.__name__}())"
        )
    kind = type(implementation)
    methods = declared_by(kind) if interface is None else interface_of(interface)
    if not methods:
        remedy = (
            f"say which ones it answers: handle_all({kind.__name__}(), Protocol), or mark them with @method()"
        )
        raise ConfigError(key, implementation, "declares no methods", remedy)
    functions = [(each, _function(key, each, implementation)) for each in methods]
    for each, function in functions:
        options = each.options
        handlers.add(
            each.name,
            function,
            idempotent=bool(options.idempotent),
            anywhere=options.anywhere,
            concurrency=options.concurrency,
            request=each.request,
        )


def _function(key: str, method: Method, implementation: object) -> Callable[[Any], Any]:
    """What answers *method*. Raises ConfigError for an implementation that takes other arguments."""
    function: Any = getattr(implementation, method.attribute, None)
    remedy = f"implement async def {method.attribute}{method.signature}"
    if function is None:
        raise ConfigError(key, implementation, f"has no {method.attribute}", remedy)
    is_right = inspect.isasyncgenfunction if method.is_stream else inspect.iscoroutinefunction
    if not (method.is_async and is_right(function)):
        problem = "is no async generator: it has to yield" if method.is_stream else "is not async"
        raise ConfigError(key, implementation, f"{method.attribute} {problem}", remedy)
    required = [name for name in method.names if name not in method.optional]
    for given in (required, method.names):
        try:
            signature = inspect.signature(function)
            signature.bind(**dict.fromkeys(given)) if method.is_mapping else signature.bind(*given)
        except TypeError as error:
            problem = f"{method.attribute} takes other arguments than {method.key} ({error})"
            raise ConfigError(key, implementation, problem, remedy) from None
    begin = _beginning(function, method)
    return _streaming(begin) if method.is_stream else _answering(begin)


def _beginning(function: Callable[..., Any], method: Method) -> Callable[[Any], Any]:
    """Begins *function* with the parts of a request."""
    if not method.takes_request:
        return lambda request: function()
    if not method.is_mapping:
        return function
    names = method.names

    def begin(request: msgspec.Struct) -> Any:
        values = zip(names, msgspec.structs.astuple(request), strict=True)
        return function(**{name: value for name, value in values if value is not msgspec.UNSET})

    return begin


def _answering(begin: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    async def handle(request: Any) -> Any:
        return await begin(request)

    return handle


def _streaming(begin: Callable[[Any], AsyncGenerator[Any]]) -> Callable[[Any], AsyncGenerator[Any]]:
    async def handle(request: Any) -> AsyncGenerator[Any]:
        async with contextlib.aclosing(begin(request)) as items:
            async for item in items:
                yield item

    return handle


__all__ = ["handle_all"]
