"""What an app declares: its configuration, its hooks, what it runs and at which addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from phalanx.config import AppConfig, Events
from phalanx.decide.backoff import Backoff
from phalanx.errors import AddressError, BackendError
from phalanx.hooks import Hooks
from phalanx.messaging.event_handlers import RETRY, EventHandlers, Start
from phalanx.messaging.handlers import DEFAULT_CONCURRENCY, Handlers
from phalanx.messaging.middleware import HandlerMiddleware
from phalanx.messaging.served import handle_all
from phalanx.ports import AddressClaim, Backend, SectionAddresses

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=HandlerMiddleware)


class Declared:
    """An app of any pattern as it was declared, whether its platform runs or not.

    ``backend`` and ``addresses`` are what it runs while it is active; None: it declares none.
    """

    def __init__(
        self,
        config: AppConfig,
        backend: Backend | None,
        addresses: SectionAddresses | None,
        on_hook_run: Callable[[str, float], None],
    ) -> None:
        self.config, self.name = config, config.name
        self.backend, self.addresses = backend, addresses
        self.hooks = Hooks(config.name, config.hook_timeouts, on_hook_run)
        self.handlers = Handlers(config.name)
        """The calls that it answers."""

    def on_start(self, function: F) -> F:
        """Runs once when the node starts, before it may become active. A failure bars the node."""
        self.hooks.add("on_start", function)
        return function

    def on_stop(self, function: F) -> F:
        """Runs once when the node stops, after the app has been handed over."""
        self.hooks.add("on_stop", function)
        return function

    def on_health_change(self, function: F) -> F:
        """Runs when the verdict of this node's health checks changes, with a :class:`HealthChange`."""
        self.hooks.add("on_health_change", function)
        return function

    def handle(
        self,
        method: str,
        *,
        idempotent: bool = False,
        anywhere: bool = False,
        concurrency: int = DEFAULT_CONCURRENCY,
        request: Any = None,
    ) -> Callable[[F], F]:
        """Answer calls of *method* by other apps: ``async def place(order: Order, ctx) -> Receipt``.

        The request is checked against the annotation (or *request*), before the function runs. It runs while
        this node is active for the app; *anywhere*: also on standbys, for callers that ask for Any or a Node.
        *idempotent*: a call may be made again although it may have been carried out. *concurrency*: calls
        that run at a time on one node, 1 to 65536; more are answered "busy". Raises ConfigError.
        """

        def declare(function: F) -> F:
            self.handlers.add(
                method,
                function,
                idempotent=idempotent,
                anywhere=anywhere,
                concurrency=concurrency,
                request=request,
            )
            return function

        return declare

    def handle_all(self, implementation: object, interface: type | None = None) -> None:
        """Answer calls of all methods of *interface*, a Protocol or class, by those of *implementation*.

        Callers make a stub of the same *interface*. Without it: all methods that the class of
        *implementation* declares with ``@phalanx.method()``. The methods are async and take what the
        interface says; :func:`phalanx.current_call` is what handlers get as ``ctx``. Raises ConfigError.
        """
        handle_all(self.handlers, self.name, implementation, interface)

    def middleware(self, function: M) -> M:
        """Runs around every handler of the app: ``async def m(call: CallContext, proceed)``.

        The first one declared is the outermost. It runs inside the active section and the caller's deadline,
        after the request was checked; ``await proceed()`` gives the handler's answer. What it raises is told
        to the caller as what a handler raises: CallError as it is, all else as "failed". Raises ConfigError.
        """
        self.handlers.add_middleware(function)
        return function

    async def check(self) -> None:
        """Look for what would keep its backend and its addresses from this host; makes nothing.

        Raises BackendError, AddressError (step ``prepare``).
        """
        for problem in await self.problems():
            raise problem

    async def problems(self) -> list[BackendError | AddressError]:
        """What :meth:`check` would raise, all of it."""
        found: list[BackendError | AddressError] = []
        try:
            if self.backend is not None:
                await self.backend.prepare(self.name)
        except BackendError as error:
            found.append(error)
        try:
            if self.addresses is not None:
                await self.addresses.check()
        except AddressError as error:
            found.append(error)
        return found

    async def address_claims(self) -> tuple[AddressClaim, ...]:
        """Which of its addresses other hosts answer for just now. Raises AddressError."""
        return await self.addresses.claims() if self.addresses is not None else ()


class DeclaredApp(Declared):
    """An app with active sections, as it was declared: active-passive, or a pool."""

    def __init__(
        self,
        config: AppConfig,
        backend: Backend | None,
        addresses: SectionAddresses | None,
        on_hook_run: Callable[[str, float], None],
    ) -> None:
        super().__init__(config, backend, addresses, on_hook_run)
        self.event_handlers = EventHandlers(config.name)
        """The events that it handles."""

    def on_active(self, function: F) -> F:
        """Runs when this node becomes active, with an :class:`ActiveContext`.

        The app is active when it returns or calls ``ctx.ready()``. It may go on running for the whole
        section; it is cancelled when the section ends.
        """
        self.hooks.add("on_active", function)
        return function

    def on_passive(self, function: F) -> F:
        """Runs at a graceful end of the active section, after ``on_active`` has ended."""
        self.hooks.add("on_passive", function)
        return function

    def on_event(
        self,
        pattern: str,
        *,
        durable: str,
        anywhere: bool = False,
        of_platform: bool = False,
        retries: int = 5,
        retry: Backoff = RETRY,
        concurrency: int = 16,
        ack_wait: float = 30.0,
        start: Start = "all",
    ) -> Callable[[F], F]:
        """Handle events: ``async def mail(event: Event[User], ctx) -> None``. See docs/events.md.

        *pattern*: of their subjects, ``user.*`` or ``user.>``. *durable*: under this name the server
        remembers what was handled. It runs while this node is active for the app; *anywhere*: on all of its
        nodes, each event on one of them (and the events of a key in no order). *of_platform*: the platform's
        events, not the app's own. *retries*: how often an event is tried again that it failed on, after the
        delays of *retry*, before it becomes a dead letter. *concurrency*: events that are handled at a time
        on one node, of different keys. *ack_wait*: seconds after which another node may get an event of a
        shared consumer whose node is gone. *start*: where a durable that is new begins: with ``all`` events
        that are kept, with ``new`` ones, or from a time on. Raises ConfigError.
        """

        def declare(function: F) -> F:
            self.event_handlers.add(
                pattern,
                function,
                durable=durable,
                of_platform=of_platform,
                anywhere=anywhere,
                retries=retries,
                retry=retry,
                concurrency=concurrency,
                ack_wait=ack_wait,
                start=start,
            )
            return function

        return declare

    @property
    def events_config(self) -> Events | None:
        """How the app keeps events of its own; None: it has none."""
        if self.config.events is None and any(not each.of_platform for each in self.event_handlers):
            return Events()
        return self.config.events

    @property
    def bound_because(self) -> str:
        """Why what it runs is bound to end with the node, by its kind; empty if it is not."""
        if self.config.database is not None:
            return "its database is captured by the node"
        if self.backend is None or "on_active" in self.hooks or "on_passive" in self.hooks:
            return "its hooks are code inside the node"
        if self.handlers or self.event_handlers.in_section:
            return "its handlers are code inside the node"
        return ""

    @property
    def can_adopt(self) -> bool:
        """Whether all that it runs can outlive a node, by its kind: a program of its own, and addresses."""
        return not self.bound_because


__all__ = ["Declared", "DeclaredApp"]
