"""Who leads an app, as a caller knows it: asked once, then followed on the leader key's watch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Protocol

import msgspec

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.decide.election import LeaderBody
from phalanx.errors import BusError, BusUnavailable
from phalanx.messaging.call_wire import Leading
from phalanx.names import Names
from phalanx.ports import Bus, Message, Subscription

log = logging.getLogger("phalanx.calls")

ASK_AGAIN_SECONDS = 0.25
"""Between questions who leads while somebody waits for it: a message of the watch may have been lost."""

ASK_TIMEOUT_SECONDS = 0.5

_leader_of = msgspec.json.Decoder(LeaderBody).decode
_leading_of = msgspec.json.Decoder(Leading).decode


MOVED_SECONDS = 2.0
"""How long a leader that was followed by another may take to say of a call "moved", or that it was ended:
a hand-over is often faster than that answer. Calls that may be repeated do not wait for it."""


class UnderWay(Protocol):
    """What is under way at the leader of one epoch; None: of none."""

    @property
    def epoch(self) -> int | None: ...

    def end_soon(self) -> None:
        """A later epoch has begun."""
        ...

    def end_now(self) -> None:
        """Whatever the epoch."""
        ...


class InFlight:
    """A try of a call that is under way under *epoch* (None: under none): it ends *seconds* after a later one
    has begun.

    What ``asyncio.timeout`` does, without what that costs where nothing happens. Around the request::

        try: ...
        except asyncio.CancelledError:
            if not each.has_ended(): raise
        finally: each.close()
    """

    __slots__ = ("_cancelling", "_seconds", "_task", "_timer", "epoch", "is_over")

    def __init__(self, epoch: int | None, seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None  # a coroutine runs in one
        self.epoch, self._seconds, self._task = epoch, seconds, task
        self._cancelling = task.cancelling()
        self._timer: asyncio.TimerHandle | None = None
        self.is_over = False

    def end_soon(self) -> None:
        """A later epoch has begun."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    def end_now(self) -> None:
        """Whatever the epoch."""
        self.close()
        self._end()

    def _end(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._task.cancel()

    def has_ended(self) -> bool:
        """Whether a cancellation was this one's alone. Asked once, for each."""
        return self.is_over and self._task.uncancel() <= self._cancelling

    def close(self) -> None:
        """It is not under way any more."""
        if self._timer is not None:
            self._timer.cancel()


class Followed(Protocol):
    """What a call under an epoch goes by: ``epoch`` is the newest one that was heard of."""

    @property
    def epoch(self) -> int: ...
    @property
    def in_flight(self) -> set[UnderWay]: ...
    @property
    def idempotent(self) -> frozenset[str]: ...
    @property
    def is_closed(self) -> bool: ...
    def is_over(self, epoch: int) -> None:
        """Whoever had that epoch says that it is over."""
        ...


class LeaderView:
    """The leader of one app. ``epoch`` is the newest reign that was heard of, and only grows."""

    def __init__(self, bus: Bus, names: Names, app: str) -> None:
        self._bus, self._names, self._app = bus, names, app
        self.node = ""
        """Who leads under ``epoch``; empty: that reign is over, and no later one is known."""
        self.epoch = 0
        self._revision = 0
        self.idempotent: frozenset[str] = frozenset()
        self.answered = False
        """Whether an instance has ever said who leads: then there is such an app."""
        self.is_pool = False
        """Whether it has said that nobody leads, as any instance may be called."""
        self.nodes: frozenset[str] = frozenset()
        """Those that run it, as an instance knew them when it was asked last."""
        self.partitions = 0
        """Into how many a ring is cut; 0: it is none, or nobody has said so yet."""
        self.in_flight: set[UnderWay] = set()
        self.is_closed = False
        self._changed = asyncio.Event()
        self._subscription: Subscription | None = None
        self._asking: asyncio.Task[bool] | None = None

    async def start(self) -> None:
        """Begin to follow. Raises BusError."""
        subject = self._names.leader_watch_subject(self._app)
        self._subscription = await self._bus.subscribe(subject, self._on_record)

    def end_calls(self) -> None:
        """All that are under way end now: nobody will take their answers."""
        for each in list(self.in_flight):
            each.end_now()

    async def close(self) -> None:
        """Follow no more; whoever waits for news waits no more."""
        self.is_closed = True
        self._wake()
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    def _on_record(self, message: Message) -> None:
        revision = message.headers.get("Nats-Sequence", "")
        if not revision.isdigit():
            return
        with contextlib.suppress(msgspec.MsgspecError):
            session = _leader_of(message.data).session
            self.learn(session.node if session is not None else "", int(revision))

    def learn(self, node: str, revision: int) -> None:
        """The leader key had this *revision*, and named *node* (empty: nobody)."""
        if revision <= self._revision:
            return
        self._revision, self.node = revision, node
        if node:
            self.epoch = revision
            for each in list(self.in_flight):
                if each.epoch is not None and each.epoch < revision:
                    each.end_soon()
        self._wake()

    def is_over(self, epoch: int) -> None:
        """Whoever led under *epoch* says that it does not any more."""
        if self.epoch == epoch:
            self.node = ""

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def ask(self, until: float) -> bool:
        """Ask any instance who leads, until *until* (``system.now()``) at most; whether one has answered.

        Several who ask at once share one answer.
        """
        asking = self._asking
        if asking is None or asking.done():
            asking = self._asking = asyncio.create_task(self._ask(), name=f"who leads {self._app}")
        # Not awaited itself: its cancellation, by close(), is none of whoever waits for it here.
        await asyncio.wait({asking}, timeout=until - system.now())
        return asking.done() and not asking.cancelled() and asking.result()

    async def _ask(self) -> bool:
        try:
            answer = await self._bus.request(
                self._names.call_who_subject(self._app), timeout=ASK_TIMEOUT_SECONDS
            )
            leading = _leading_of(answer.data)
        except BusUnavailable:
            return False
        except (BusError, msgspec.MsgspecError) as error:
            log.debug("who leads %s: %s", self._app, error)
            return False
        self.answered = True
        self.idempotent = frozenset(leading.idempotent)
        self.is_pool = leading.pattern == "pool"
        self.partitions = leading.partitions
        self.nodes = frozenset(leading.nodes)
        self.learn(leading.node, leading.epoch)
        if leading.node and leading.epoch == self.epoch:
            self.node = leading.node
        self._wake()
        return True

    async def wait(self, until: float, seconds: float = ASK_AGAIN_SECONDS) -> None:
        """Wait for news, for *seconds* and until *until* (``system.now()``) at most; then ask."""
        changed = self._changed
        if self.is_closed:
            return
        if not await wait_at_most(changed, min(seconds, until - system.now())) and system.now() < until:
            await self.ask(until)
