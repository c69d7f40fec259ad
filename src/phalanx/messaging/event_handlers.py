"""The event handlers that an app declares, and what each has done."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Literal

from phalanx.decide.backoff import Backoff
from phalanx.errors import ConfigError
from phalanx.messaging.content import Shape, shape_of
from phalanx.messaging.event import Event, check_durable, check_subject

RETRY = Backoff(first=1.0, longest=60.0)
"""Delays before a failed event is tried again, unless the handler says otherwise."""

MAX_CONCURRENCY = 1024
MIN_IN_FLIGHT = 128

Function = Callable[..., Awaitable[None]]
Start = Literal["all", "new"] | datetime | float


class EventHandler:
    """One durable consumer of an app, as declared. The last fields are statistics of this node."""

    def __init__(
        self,
        app: str,
        pattern: str,
        function: Function,
        *,
        durable: str,
        of_platform: bool,
        anywhere: bool,
        retries: int,
        retry: Backoff,
        concurrency: int,
        ack_wait: float,
        start: Start,
    ) -> None:
        key = f"apps.{app}.on_event({pattern!r})"
        self.app, self.pattern, self.function = app, check_subject(pattern, pattern=True), function
        self.durable = check_durable(f"{key}.durable", durable)
        self.of_platform, self.anywhere = of_platform, anywhere
        self.retries = _whole(f"{key}.retries", retries, 0, 1000)
        self.concurrency = _whole(f"{key}.concurrency", concurrency, 1, MAX_CONCURRENCY)
        if isinstance(ack_wait, bool) or not 1 <= ack_wait <= 3600:
            raise ConfigError(f"{key}.ack_wait", ack_wait, "out of range", "choose 1 to 3600 seconds")
        if isinstance(start, str) and start not in ("all", "new"):
            raise ConfigError(f"{key}.start", start, "neither all nor new nor a time", 'write "all" or "new"')
        self.retry, self.ack_wait_seconds, self.start = retry, float(ack_wait), start
        self.in_flight = max(MIN_IN_FLIGHT, 8 * concurrency)
        """How many events are delivered and not acknowledged at a time, at most."""
        self.takes_context, kind = _signature(key, function)
        try:
            self.shape: Shape = shape_of(kind)
        except TypeError as error:
            remedy = "use Event[…] of a msgspec struct, a dataclass, a pydantic model or a plain type"
            raise ConfigError(key, kind, str(error), remedy) from None
        self.handled = self.failed = self.dead = self.lag = self.unacknowledged = 0

    def call(self, event: Event[Any], context: Any) -> Awaitable[None]:
        """Begin to handle one."""
        return self.function(event, context) if self.takes_context else self.function(event)


class EventHandlers:
    """Those of one app, by durable name: whatever they handle, a name stands for one of them."""

    def __init__(self, app: str) -> None:
        self._app = app
        self.by_durable: dict[str, EventHandler] = {}
        self.is_served = False
        """Whether they are handled already: then no more can be declared."""

    def add(self, pattern: str, function: Function, **options: Any) -> None:
        """Declare one; *options* are those of EventHandler. Raises ConfigError."""
        key = f"apps.{self._app}.on_event({pattern!r})"
        if self.is_served:
            raise ConfigError(key, pattern, "the platform runs already", "declare handlers before")
        handler = EventHandler(self._app, pattern, function, **options)
        known = self.by_durable.get(handler.durable)
        if known is not None:
            raise ConfigError(
                f"{key}.durable",
                handler.durable,
                f"declared twice, the other time for {known.pattern}",
                "give each handler a durable name of its own",
            )
        self.by_durable[handler.durable] = handler

    def __bool__(self) -> bool:
        return bool(self.by_durable)

    def __iter__(self) -> typing.Iterator[EventHandler]:
        return iter(self.by_durable.values())

    @property
    def in_section(self) -> list[EventHandler]:
        """Those that run in the active section."""
        return [handler for handler in self if not handler.anywhere]


def _whole(key: str, value: int, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(key, value, "out of range", f"choose {least} to {most}")
    return value


def _signature(key: str, function: Function) -> tuple[bool, Any]:
    """Whether it takes a context; the type of the data."""
    if not inspect.iscoroutinefunction(function):
        remedy = "make it async; for what blocks use asyncio.to_thread inside, and wait for its end"
        raise ConfigError(key, function, "not an async function", remedy)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    every = list(inspect.signature(function).parameters.values())
    if not 1 <= len(every) <= 2 or any(parameter.kind not in kinds for parameter in every):
        raise ConfigError(key, function, "has other parameters", "a handler takes (event) or (event, ctx)")
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        remedy = "declare its types at the module's top"
        raise ConfigError(key, function, f"its types cannot be found ({error})", remedy) from None
    hint = hints.get(every[0].name, Event)
    if hint is Event:
        return len(every) == 2, Any
    if typing.get_origin(hint) is not Event:
        raise ConfigError(key, hint, "not an Event", "annotate its parameter as Event[Type]")
    return len(every) == 2, typing.get_args(hint)[0]


__all__ = ["RETRY", "EventHandler", "EventHandlers", "Start"]
