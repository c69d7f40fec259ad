"""Stubs: objects with the methods of a Protocol or class, each of which is a call to an app."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any as Value
from typing import ClassVar, TypeVar, cast

import msgspec

from phalanx.errors import ConfigError
from phalanx.messaging.content import JSON
from phalanx.messaging.interface import Interface, Method, interface_of
from phalanx.messaging.routes import Default, Route

S = TypeVar("S")

Call = Callable[..., Value]
"""``Api.call`` or ``Api.stream``, or those of ``SyncApi``."""

Check = Callable[[str, Route, float, str], None]


class CallOptions(msgspec.Struct, frozen=True):
    """How calls are made; None: as is said elsewhere."""

    to: Route | Callable[..., Route] | None = None
    timeout: float | None = None
    idempotent: bool | None = None
    content_type: str | None = None
    headers: Mapping[str, str] | None = None

    def over(self, other: CallOptions) -> CallOptions:
        """These, and where they say nothing those of *other*."""
        return CallOptions(
            *(
                mine if mine is not None else theirs
                for mine, theirs in zip(_all(self), _all(other), strict=True)
            )
        )

    def check(self, key: str, check: Check) -> None:
        """Raises ConfigError for what no call can be made with."""
        to = self.to if self.to is not None and not callable(self.to) else Default
        timeout = 1.0 if self.timeout is None else self.timeout
        try:
            check("any", to, timeout, self.content_type or JSON)
        except ConfigError as error:
            raise ConfigError(f"{key}.{error.key}", error.value, error.problem, error.remedy) from None


_all = msgspec.structs.astuple

_NOTHING = CallOptions()


class Stub:
    """What stubs have in common. Their methods have no state: a stub may be used by many at a time."""

    __slots__ = ("_app", "_call", "_check", "_defaults", "_overrides", "_stream")

    _interface: ClassVar[type]

    def __init__(
        self,
        app: str,
        call: Call,
        stream: Call,
        check: Check,
        defaults: CallOptions,
        overrides: CallOptions = _NOTHING,
    ) -> None:
        self._app, self._call, self._stream, self._check = app, call, stream, check
        self._defaults, self._overrides = defaults, overrides

    def _make(self, method: Method, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """The call of *method*: what is to be awaited or iterated; of a synchronous client the answer."""
        options, defaults, now = method.options, self._defaults, self._overrides
        to = _first(now.to, options.to, defaults.to, Default)
        said = {
            "returns": method.returns,
            "to": to(*args, **kwargs) if callable(to) else to,
            "timeout": _first(now.timeout, options.timeout, defaults.timeout, 5.0),
            "content_type": _first(now.content_type, defaults.content_type, JSON),
            "headers": _first(now.headers, defaults.headers),
        }
        request = method.request_of(args, kwargs)
        if method.is_stream:
            return self._stream(method.name, request, **said)
        idempotent = _first(now.idempotent, options.idempotent, defaults.idempotent)
        return self._call(method.name, request, idempotent=idempotent, **said)

    def _with(self, overrides: CallOptions) -> Stub:
        overrides.check("with_options", self._check)
        now = overrides.over(self._overrides)
        return type(self)(self._app, self._call, self._stream, self._check, self._defaults, now)

    def __repr__(self) -> str:
        return f"<stub of {self._interface.__qualname__}, app {self._app}>"


def _first(*values: Value) -> Value:
    for value in values:
        if value is not None:
            return value
    return None


def with_options(
    stub: S,
    *,
    to: Route | Callable[..., Route] | None = None,
    timeout: float | None = None,
    idempotent: bool | None = None,
    content_type: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> S:
    """The same stub with other options, which go before all others: for one call, or some.

    ``await with_options(orders, timeout=30).place(order)``. Raises ConfigError.
    """
    if not isinstance(stub, Stub):
        raise ConfigError("with_options", stub, "not a stub", 'make one: platform.api("orders").stub(Orders)')
    options = CallOptions(to, timeout, idempotent, content_type, headers)
    return cast(S, stub._with(options))  # pyright: ignore[reportPrivateUsage]


def make_stub(
    app: str,
    call: Call,
    stream: Call,
    check: Check,
    interface: type[S],
    defaults: CallOptions,
    *,
    is_async: bool,
) -> S:
    """A stub of *interface*, all of whose methods are async, or none. Raises ConfigError."""
    methods = interface_of(interface)
    for each in methods:
        if each.is_async != is_async:
            problem = "not async" if is_async else "async, and this client waits for each answer"
            remedy = _remedy(each, is_async=is_async)
            raise ConfigError(each.key, each.attribute, problem, remedy)
        CallOptions(each.options.to, each.options.timeout).check(each.key, check)
        check(each.name, Default, 1.0, JSON)
    defaults.check("stub", check)
    return cast(S, _class_of(interface, methods)(app, call, stream, check, defaults))


@functools.lru_cache(maxsize=256)
def _class_of(interface: type, methods: Interface) -> type[Stub]:
    made: dict[str, Value] = {"__slots__": (), "_interface": interface, "__doc__": interface.__doc__}
    for each in methods:
        made[each.attribute] = _async_call(each) if each.is_async and not each.is_stream else _sync_call(each)
    return type(f"{interface.__name__}Stub", (Stub,), made)


def _remedy(method: Method, *, is_async: bool) -> str:
    if method.is_stream:
        return f"let it give {'an AsyncIterator' if is_async else 'an Iterator'}[…]"
    return f"declare {'async def' if is_async else 'def'} {method.attribute}(…)"


def _async_call(method: Method) -> Callable[..., Value]:
    async def call(self: Stub, *args: Value, **kwargs: Value) -> Value:
        return await self._make(method, args, kwargs)  # pyright: ignore[reportPrivateUsage]

    return _named(call, method)


def _sync_call(method: Method) -> Callable[..., Value]:
    def call(self: Stub, *args: Value, **kwargs: Value) -> Value:
        return self._make(method, args, kwargs)  # pyright: ignore[reportPrivateUsage]

    return _named(call, method)


def _named(call: Callable[..., Value], method: Method) -> Callable[..., Value]:
    call.__name__, call.__qualname__, call.__doc__ = method.attribute, method.key, method.doc
    return call


__all__ = ["CallOptions", "Stub", "make_stub", "with_options"]
