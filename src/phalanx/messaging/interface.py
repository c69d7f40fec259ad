"""The methods of an app as a Protocol or a class declares them: names, types, how they are called.

Read once, and checked as a whole: whoever makes a stub or serves an implementation learns then what could not
be called. A single parameter is the request; several ones, and keyword-only ones, form a mapping by name.
What gives an AsyncIterator (an Iterator, for synchronous clients) is a stream of answers.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from phalanx.errors import ConfigError
from phalanx.messaging.content import shape_of
from phalanx.messaging.context import CallContext
from phalanx.messaging.handlers import DEFAULT_CONCURRENCY
from phalanx.messaging.routes import Route

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = "__phalanx_method__"

_ASYNC_STREAMS = (abc.AsyncIterator, abc.AsyncGenerator, abc.AsyncIterable)
_STREAMS = (abc.Iterator, abc.Generator, abc.Iterable)

_MISSING = inspect.Parameter.empty


class MethodOptions(msgspec.Struct, frozen=True):
    """What :func:`method` says of one."""

    name: str | None = None
    to: Route | Callable[..., Route] | None = None
    timeout: float | None = None
    idempotent: bool | None = None
    anywhere: bool = False
    concurrency: int = DEFAULT_CONCURRENCY


def method(
    name: str | None = None,
    *,
    to: Route | Callable[..., Route] | None = None,
    timeout: float | None = None,
    idempotent: bool | None = None,
    anywhere: bool = False,
    concurrency: int = DEFAULT_CONCURRENCY,
) -> Callable[[F], F]:
    """Say more of a method of a Protocol or class that an app serves, or that stubs are made of.

    *name*: on the wire, if not that of the function. For callers: *to*, a route or a function that gives one
    for the arguments of the call (``lambda order: Key(order.customer)``); *timeout* in seconds. For both:
    *idempotent*. For the app: *anywhere* and *concurrency*, see :meth:`phalanx.App.handle`.
    """
    options = MethodOptions(name, to, timeout, idempotent, anywhere, concurrency)

    def declare(function: F) -> F:
        setattr(function, _OPTIONS, options)
        return function

    return declare


class Method:
    """One method. ``attribute``: as the code calls it; ``name``: on the wire.

    ``request``: the type of the request, ``takes_request``: whether there is one; ``returns``: that of the
    answer, or of each item if it ``is_stream``. ``is_async``: callers need an event loop. ``optional``:
    parameters of a mapping that may be left out; what they are then says the app.
    """

    def __init__(
        self, key: str, attribute: str, function: Callable[..., Any], options: MethodOptions
    ) -> None:
        self.key, self.attribute, self.options = key, attribute, options
        self.name = options.name or attribute
        self.doc = function.__doc__
        hints = _hints(key, function)
        signature = inspect.signature(function)
        _, *parameters = signature.parameters.values()
        self.signature = signature.replace(parameters=parameters)
        for parameter in parameters:
            _check_parameter(key, parameter, hints)
        self.names = tuple(parameter.name for parameter in parameters)
        self.optional = frozenset(p.name for p in parameters if p.default is not _MISSING)
        self.takes_request = bool(parameters)
        self.is_mapping = len(parameters) > 1 or any(p.kind is p.KEYWORD_ONLY for p in parameters)
        if not self.is_mapping and self.optional:
            remedy = f"make it keyword-only (*, {parameters[0]}), or give it none"
            raise ConfigError(
                f"{key}.{self.names[0]}", str(parameters[0]), "a request has no default", remedy
            )
        if "return" not in hints:
            raise ConfigError(
                key, None, "says not what it returns", "annotate it: -> Receipt, -> None, or -> typing.Any"
            )
        self.returns, self.is_stream, self.is_async = _answer(key, function, hints["return"])
        self.request = self._request_type(hints)
        _check_sendable(f"{key}.return", self.returns)

    def _request_type(self, hints: Mapping[str, Any]) -> Any:
        for name in self.names:
            _check_sendable(f"{self.key}.{name}", hints[name])
        if not self.is_mapping:
            return hints[self.names[0]] if self.names else Any
        # What is left out is not sent, so that the default of whoever serves it counts.
        fields: list[tuple[str, Any, Any]] = [
            (name, hints[name] | msgspec.UnsetType, msgspec.UNSET) if name in self.optional
            else (name, hints[name], msgspec.NODEFAULT)
            for name in self.names
        ]  # fmt: skip
        return msgspec.defstruct(f"{self.attribute}_request", fields, kw_only=True)

    def request_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is sent for these arguments. Raises TypeError for others than it has, as any function."""
        if len(args) == 1 and not kwargs and self.takes_request and not self.is_mapping:
            return args[0]
        arguments = self.signature.bind(*args, **kwargs).arguments
        if self.is_mapping:
            return dict(arguments)
        return arguments[self.names[0]] if self.names else None


Interface = tuple[Method, ...]


def interface_of(kind: type) -> Interface:
    """All public methods of *kind*. Raises ConfigError for what is no class, or one that cannot be called."""
    if not isinstance(kind, type):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError("interface", kind, "not a class", "give a Protocol, or a class with methods")
    return _interface_of(kind)


@functools.lru_cache(maxsize=256)
def _interface_of(kind: type) -> Interface:
    found: dict[str, Method] = {}
    for each in reversed(kind.__mro__):
        if each in (object, typing.Protocol, typing.Generic):
            continue
        for name in (*vars(each), *inspect.get_annotations(each)):
            if not name.startswith("_"):
                found[name] = _method(kind, name)
    if not found:
        raise ConfigError(kind.__qualname__, kind, "has no methods", "declare some: async def place(self, …)")
    _check_names(kind, found.values())
    return tuple(found.values())


def declared_by(kind: type) -> Interface:
    """The methods of the class *kind* that it, or one of its bases, declares with :func:`method`."""
    found: list[Method] = []
    for name in dir(kind):
        options = _options_of(kind, name)
        if options is not None:
            found.append(_method(kind, name))
    _check_names(kind, found)
    return tuple(found)


def _method(kind: type, name: str) -> Method:
    key = f"{kind.__qualname__}.{name}"
    function = inspect.getattr_static(kind, name, None)
    if not inspect.isfunction(function):
        raise ConfigError(
            key, function, "not a method", f"only methods are called; name it _{name} if it is none"
        )
    return Method(key, name, function, _options_of(kind, name) or MethodOptions())


def _options_of(kind: type, name: str) -> MethodOptions | None:
    """Those of the nearest base that says any: whoever implements a method need not repeat them."""
    for each in kind.__mro__:
        options = getattr(vars(each).get(name), _OPTIONS, None)
        if options is not None:
            return options
    return None


def _check_names(kind: type, methods: Iterable[Method]) -> None:
    by_name: dict[str, Method] = {}
    for each in methods:
        other = by_name.setdefault(each.name, each)
        if other is not each:
            problem = f"{each.attribute} and {other.attribute} have one name"
            raise ConfigError(kind.__qualname__, each.name, problem, "choose another: @method(name)")


def _hints(key: str, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        remedy = "declare its types at the module's top, and import them outside of `if TYPE_CHECKING`"
        raise ConfigError(key, function, f"its types cannot be found ({error})", remedy) from None


def _answer(key: str, function: Callable[..., Any], returns: Any) -> tuple[Any, bool, bool]:
    """The type of the answer, or of an item; whether it is a stream; whether callers need an event loop."""
    origin = typing.get_origin(returns) or returns
    is_async_stream = origin in _ASYNC_STREAMS
    if inspect.iscoroutinefunction(function):
        if is_async_stream:
            remedy = f"declare it without async, or let it yield: def {function.__name__}(…) -> {returns}"
            raise ConfigError(key, returns, "a coroutine that gives a stream", remedy)
        return returns, False, True
    if not (is_async_stream or origin in _STREAMS):
        return returns, False, False
    items = typing.get_args(returns)
    if not items:
        raise ConfigError(key, returns, "says not of what", f"say it: {origin.__name__}[Order]")
    return items[0], True, is_async_stream


def _check_parameter(key: str, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> None:
    key = f"{key}.{parameter.name}"
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ConfigError(key, str(parameter), "any arguments cannot be checked", "name each of them")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise ConfigError(key, str(parameter), "positional-only", "leave out the /: arguments go by name")
    if parameter.name not in hints:
        raise ConfigError(key, None, "has no type", f"annotate it: {parameter.name}: Order, or typing.Any")
    if hints[parameter.name] is CallContext:
        raise ConfigError(
            key, CallContext, "the caller has none", "leave it out; the app has phalanx.current_call()"
        )


def _check_sendable(key: str, kind: Any) -> None:
    try:
        shape_of(kind)
    except TypeError as error:
        remedy = "use a msgspec struct, a dataclass, a pydantic model or a plain type"
        raise ConfigError(key, kind, str(error), remedy) from None


__all__ = ["Interface", "Method", "MethodOptions", "declared_by", "interface_of", "method"]
