"""One ring app: the public face of its declaration and of the partitions that this node owns."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from phalanx import system
from phalanx.app.contexts import HealthChange
from phalanx.app.on_node import OnNode
from phalanx.app.owning import PartitionHook
from phalanx.app.parts import NodeParts, instances_of
from phalanx.app.ring_term import RingTerm
from phalanx.config import AppConfig, Ring
from phalanx.coord.locks import Locks
from phalanx.coord.register import Register
from phalanx.coord.ring import other_partitions
from phalanx.coord.session import Session
from phalanx.decide.partition import partition_of
from phalanx.decide.ring_plan import RingPlan
from phalanx.errors import BusError, ConfigError, HookFailed, StartError
from phalanx.messaging.ring_serving import RingCallServer
from phalanx.names import RING_PLAN_KEY
from phalanx.ports import SectionCalls
from phalanx.types import AppStatus, Health, Role, Standing

log = logging.getLogger("phalanx.app")

F = TypeVar("F", bound=Callable[..., Any])

READ_PATIENCE_SECONDS = 30.0
"""How long a node that starts tries to read the plan of its ring."""

STUCK_SECONDS = 10.0
"""A partition that should have ended and does not: after this long the node gives all others back, and
ends."""


class RingApp(OnNode):
    """An app whose partitions are spread over the nodes. Made by :meth:`phalanx.Platform.app`."""

    can_adopt = False
    """What it runs is code inside the node."""
    stays_in_pause = False
    spool_bytes = 0

    def __init__(self, config: AppConfig) -> None:
        super().__init__(config)
        assert isinstance(config.pattern, Ring), "the platform makes no RingApp of another pattern"
        self.pattern = config.pattern
        self._partition_hooks: dict[str, PartitionHook] = {}
        self._term: RingTerm | None = None
        self._ring_calls: RingCallServer | None = None
        self._barred = ""
        """Why this node does nothing for the app as long as it lives; empty: it does."""
        self._leaving = ""
        """Why it begins nothing more under this session, which is being given up."""
        self._is_started = False
        self._when_idle: Callable[[], None] | None = None
        self._stuck_timers: set[asyncio.TimerHandle] = set()

    # --- declaring

    def on_own(self, function: F) -> F:
        """Runs when this node becomes the owner of a partition: ``async def own(partition, ctx)``, with a
        :class:`PartitionContext`. Only when it has returned are calls to the partition answered here.

        If it fails, the partition is given back, and tried again after ``retry``.
        """
        return self._add_hook("on_own", function)

    def on_release(self, function: F) -> F:
        """Runs before a partition is given back: ``async def release(partition, ctx)``. Its next owner begins
        when it has returned. Not run where there is no time: the session is over."""
        return self._add_hook("on_release", function)

    def on_prepare(self, function: F) -> F:
        """Runs on the next owner of a partition while the present one still serves it: ``async def
        prepare(partition, ctx)``, with a :class:`PrepareContext`. Best effort, within its deadline: read what
        ``on_own`` will need. Not run for what has lost its owner."""
        return self._add_hook("on_prepare", function)

    def _add_hook(self, name: str, function: F) -> F:
        key = f"apps.{self.name}.{name}"
        if name in self._partition_hooks:
            raise ConfigError(key, function, "the app has this hook already", "call both from one function")
        if not inspect.iscoroutinefunction(function):
            remedy = "make it async; for what blocks use asyncio.to_thread inside, and wait for its end"
            raise ConfigError(key, function, "not an async function", remedy)
        try:
            inspect.signature(function).bind(0, None)
        except TypeError:
            remedy = "a hook of partitions takes (partition, ctx)"
            raise ConfigError(key, function, "has other parameters", remedy) from None
        self._partition_hooks[name] = function
        return function

    def partition_hook(self, name: str) -> PartitionHook | None:
        """The hook that was declared under this name; None: there is none."""
        return self._partition_hooks.get(name)

    # --- what is so

    @property
    def partitions(self) -> tuple[int, ...]:
        """The partitions that this node owns: ``on_own`` has ended, and they are not being given back."""
        term = self._term
        return tuple(term.hooks.ready) if term is not None and term.session.is_valid else ()

    def partition_of(self, key: str | bytes) -> int:
        """The partition of *key*, from 0; see docs/ring.md."""
        return partition_of(key, self.pattern.partitions)

    def owner_of(self, key: str | bytes) -> str | None:
        """The node that owns the partition of *key*, as this node knows; None while nobody does."""
        if self._term is None:
            return None
        _, session = self._term.ring.owner(self.partition_of(key))
        if session is None or self._term.register.is_over(session):
            return None
        return session.node

    def _locks_now(self) -> Locks | None:
        return self._term.locks if self._term is not None else None

    def _unready_because(self) -> str:
        """Why this node should own nothing now; empty if it may."""
        if self._barred or self._leaving:
            return self._barred or self._leaving
        if self.health.verdict is Health.UNHEALTHY:
            return f"unhealthy: {self.health.reason}"
        if self.health.verdict is Health.UNKNOWN and self.config.checks:
            return "its health checks have not answered yet"
        return ""

    @property
    def has_section(self) -> bool:
        """Whether something of a partition may run here."""
        return self._term is not None and not self._term.hooks.is_empty

    @property
    def is_idle(self) -> bool:
        """Whether nothing of it runs here, and what it held was given back (or tried to)."""
        return self._term is None or self._term.is_idle

    def others_can(self) -> bool:
        """Whether another node may be given partitions."""
        if self._term is None:
            return False
        members = self._term.ring.members.items()
        return any(member.ready and member.weight and node != self.node for node, member in members)

    def status(self) -> AppStatus:
        """The app on this node, as /status shows it."""
        term = self._term
        because = self._unready_because()
        return AppStatus(
            self.name,
            self.role,
            self.health.verdict,
            since=self._role.since,
            reason=self._role.reason,
            pause=self.pause,
            standing=Standing(
                eligible=not because, ttl_seconds=term.session.timing.ttl if term is not None else 0.0
            ),
            unkept="its hooks are code inside the node" if self.has_section else "",
            health_reason=self.health.reason,
            pattern="ring",
            ring=term.state() if term is not None else None,
        )

    # --- life on a node

    async def start(self, parts: NodeParts) -> None:
        """Run ``on_start``. A failure bars this node from the app; the others are not affected.

        Raises ConfigError if the ring has another number of partitions than declared.
        """
        await self._check_partitions(parts)
        self._take_up(parts)
        self._role.set(Role.STARTING, "")
        if problem := await self._run_hook("on_start"):
            self._barred = problem
        partitions = self.pattern.partitions
        self._calls = self._ring_calls = RingCallServer(
            self.name, parts.node, self.handlers, parts.bus, parts.names, self.kv, partitions
        )
        self._calls.instances = instances_of(parts, self.name)
        await self._calls.open()
        self._is_started = True

    async def stop(self) -> None:
        """Run ``on_stop``. What ran has ended before."""
        if not self._is_started:
            return
        if self._calls is not None:
            await self._calls.close()
        await self._run_hook("on_stop")
        self.hooks.close()
        self._role.set(Role.STOPPED, "")
        self._is_started = False

    async def _check_partitions(self, parts: NodeParts) -> None:
        """Data lies by the number: where it is another one nothing is to begin at all."""
        bucket = parts.names.app_bucket(self.name)
        stream, subject = parts.names.bucket_stream(bucket), parts.names.key_subject(bucket, RING_PLAN_KEY)
        deadline = system.now() + READ_PATIENCE_SECONDS
        while True:
            try:
                record = await parts.bus.read(stream, subject, timeout=2.0)
                break
            except BusError as error:
                # A bucket that has just been made has no leader yet.
                if system.now() >= deadline:
                    problem = f"the plan of ring {self.name!r} cannot be read: {error}"
                    raise StartError(problem, "check the NATS servers; phalanx doctor says more") from error
                log.info("app %s: %s; trying again", self.name, error)
                await asyncio.sleep(0.2)
        if record is None or record.removed:
            return
        found = len(msgspec.json.decode(record.data, type=RingPlan).owners)
        if found != self.pattern.partitions:
            raise other_partitions(self.name, self.pattern.partitions, found)

    async def serve(self, session: Session, register: Register) -> None:
        """Own partitions under *session* until cancelled. The guard ends them before."""
        parts, name = self._running_parts, self.name
        self._leaving = ""
        self._term = term = RingTerm(
            self,
            self.pattern,
            parts,
            session,
            register,
            calls=self._calls_of,
            paused=lambda: self.is_paused,
            on_failed=self._on_partition_failed,
            on_stuck=self._on_partition_stuck,
            on_change=self._on_ring_changed,
        )
        self.health.set_active(True)
        self._look()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._run_ring(term), name=f"{name} ring")
                tasks.create_task(self.health.run(), name=f"{name} health")
                tasks.create_task(self._tell_news(), name=f"{name} events")
        finally:
            for timer in self._stuck_timers:
                timer.cancel()
            self._stuck_timers.clear()
            await term.close()
            self.health.set_active(False)
            self._term = None
            if self._is_started:
                self._show_role()

    async def _tell_news(self) -> None:
        async def at_once() -> None:
            """Nothing that is becoming active shares its turn with them."""

        await self._news.run(at_once)

    async def _run_ring(self, term: RingTerm) -> None:
        try:
            await term.run()
        except ConfigError as error:
            # Another node was faster to make the ring, with another number.
            self._barred = str(error)
            self._journal.report("ring-refused", str(error), level=logging.ERROR)
            self._look()

    # --- what ends it

    def bar(self, reason: str) -> None:
        """Give all partitions back and take none any more under this session; empty: it goes on after all."""
        self._leaving = reason
        if self._term is not None:
            self._term.bar(reason)
        self._look()

    def end_section(self, reason: str) -> None:
        """Nothing to do: that the session runs out the ring sees by itself, all else goes by :meth:`bar`."""

    def fence(self, reason: str) -> None:
        """End all partitions at once."""
        if self._term is not None and self.has_section:
            log.warning("app %s: its partitions end at once: %s", self.name, reason)
            self._term.hooks.end_all()

    def leave(self, reason: str) -> None:
        """The node ends in a pause: what it owns is code of this process, and ends with it."""

    async def wait_ended(self) -> None:
        """Wait until nothing of any partition runs here."""
        if self._term is not None:
            await self._term.hooks.wait_empty()

    async def wait_idle(self) -> None:
        """Wait for :attr:`is_idle`."""
        while not self.is_idle:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):  # NATS may say nothing for a while
                    await self._role.wait_changed()

    def on_idle(self, callback: Callable[[], None] | None) -> None:
        """Have one function told each time the app becomes idle; None: nobody."""
        self._when_idle = callback

    # --- what happens

    def on_pauses(self) -> None:
        """Something was paused or resumed; if it was this app, what was only reported counts now."""
        if self._pausing.has_changed():
            self._look()
            self._role.wake()

    def _on_health(self, health: Health, reason: str) -> None:
        self._journal.report("health-changed", f"{health}: {reason}" if reason else str(health))
        self._news.tell("on_health_change", HealthChange(self.name, health, reason))
        self._look()

    def on_fenced(self) -> None:
        """A node was said to be off: partitions that wait for that are taken now."""
        if self._term is not None:
            self._term.register.on_fenced()

    def _look(self) -> None:
        if self._term is not None:
            self._term.offer(self._unready_because())
        if self._is_started:
            self._show_role()

    def _on_ring_changed(self) -> None:
        self._show_role()
        if self.is_idle and self._when_idle is not None:
            self._when_idle()

    def _show_role(self) -> None:
        term, because = self._term, self._unready_because()
        if term is not None and term.hooks.has_ready:
            self._role.set(Role.ACTIVE, because)
        elif term is not None and not term.hooks.is_empty:
            self._role.set(Role.STANDING_DOWN if self._leaving else Role.ACTIVATING, because)
        elif because or term is None:
            self._role.set(Role.INELIGIBLE, because or "the node has no session")
        else:
            self._role.set(Role.STANDBY, "")

    def _on_partition_failed(self, partition: int, error: HookFailed) -> None:
        epoch = self._term.ring.epoch(partition) if self._term is not None else 0
        self._journal.report(
            "hook-failed", str(error), level=logging.ERROR, epoch=epoch, partition=str(partition)
        )

    def _on_partition_stuck(self, partition: int) -> None:
        """It is never given back while its code runs: only the end of the node ends that."""
        loop = asyncio.get_running_loop()
        self._stuck_timers.add(loop.call_later(STUCK_SECONDS, self._give_up, partition))

    def _give_up(self, partition: int) -> None:
        term = self._term
        if term is None or not term.hooks.is_stuck(partition):
            return
        reason = f"code of partition {partition} does not end"
        self._journal.report("partition-stuck", reason, level=logging.CRITICAL, partition=str(partition))
        self.bar(reason)
        self._running_parts.on_stuck(self.name, reason)

    # --- calls

    def _calls_of(self, partition: int) -> SectionCalls | None:
        return self._ring_calls.of_partition(partition) if self._ring_calls is not None else None


__all__ = ["RingApp"]
