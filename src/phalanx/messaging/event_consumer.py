"""One durable consumer at work on one node: events come, are handled, acknowledged, tried again, given up.

Order. In the active section this node alone takes events from the consumer. Before it handles any it has all
that are delivered and not acknowledged, to whomever, delivered again (a "-NAK" for each; should the server
not heed that, the end of the acknowledgement's wait does it). From then on deliveries are numbered without a
gap: where a number is missing an event was lost on its way, and what comes later is held until all that is
delivered is here again. So nothing is handled while an earlier event of its key is neither done nor here.

Where all instances share the consumer (``anywhere``) there is no order between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from phalanx.aio import wait_at_most
from phalanx.errors import BusError, EventError, EventsLost, HookFailed
from phalanx.messaging.content import ContentError
from phalanx.messaging.dead_letters import bury
from phalanx.messaging.event import ONLY_FOR, Event, decoded
from phalanx.messaging.event_durable import CONSUMER_NOT_FOUND, Durable
from phalanx.messaging.event_handlers import EventHandler
from phalanx.messaging.event_order import EventOrder, Item, State
from phalanx.messaging.event_pull import ACK, IN_PROGRESS, TERM, ConsumerInfo, Delivery, Puller, nak
from phalanx.names import Names
from phalanx.observe import tracing
from phalanx.ports import Bus, Connection

log = logging.getLogger("phalanx.events")

DRAIN_SECONDS = 2.0
"""How long handlers that run may go on when the active section stands down."""

CANCEL_SECONDS = 1.0
"""How long a handler may take to end after it was cancelled."""

LOOK_SECONDS = 5.0
"""Between looks at what the server knows of the consumer."""

RECOVER_SECONDS = (0.02, 0.5)
"""Between looks whether all that is delivered is here."""

MAX_NAKS = 10_000
"""Sequences that are asked for again at a time."""

LATE_SECONDS = 2.0
"""A delayed event that the server has not delivered again so long after its time is handled all the same."""

BURY_SECONDS = 5.0
UNBURIED_SECONDS = 10.0
"""Before a dead letter that could not be stored is tried again."""

LOST_COUNT = 4
LOST_LEAST = 20
"""An event that was delivered so many times as often as it may be tried, and so often at least, and of which
no outcome is known, is given up without another try: whoever handles it may die of it."""


class EventConsumer:
    """Handles the events of *handler*, between :meth:`begin` and :meth:`end`. *report* hears what operators
    should know: an action and a reason."""

    def __init__(
        self, handler: EventHandler, bus: Bus, names: Names, report: Callable[[str, str], None]
    ) -> None:
        self._handler, self._bus, self._names, self._report = handler, bus, names, report
        self._durable = Durable(handler, bus, names)
        self._ordered = not handler.anywhere
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[asyncio.Task[None], Item] = {}
        self._reset()

    def _reset(self) -> None:
        handler = self._handler
        self._order = EventOrder()
        self._ready = asyncio.Semaphore(0)
        self._arrived, self._gap, self._looked = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._recovering = self._ordered
        self._ending = False
        self._number, self._unbroken_from = 0, 1
        """The number of the last delivery, and from which one on none is missing."""
        self._extra_room = 0
        self._context: Any = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._puller = Puller(
            self._bus,
            self._names,
            handler.app,
            self._durable.stream,
            self._durable.name,
            self._room,
            self._on_delivery,
        )
        self._stop_listening: Callable[[], None] | None = None

    async def declare(self) -> None:
        """See that the consumer exists, as it is declared. Raises BusError, EventError."""
        await self._durable.declare()

    # --- from begin to end

    async def begin(self, context: Any) -> None:
        """Handle events from now on; *context* is what handlers get. Raises BusError, EventError."""
        self._reset()
        self._context = context
        await self._puller.open()
        self._stop_listening = self._bus.on_connection(self._on_connection)
        name = f"events {self._handler.app}/{self._handler.durable}"
        self._spawn(self._pull(), f"{name} pull")
        self._spawn(self._look(), f"{name} look")
        self._spawn(self._keep(), f"{name} keep")
        if self._ordered:
            self._spawn(self._recover(), f"{name} recover")
        for _ in range(self._handler.concurrency):
            self._spawn(self._work(), name)

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_ended)
        return task

    def _on_task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("%s has failed", task.get_name(), exc_info=error)

    async def end(self, *, graceful: bool) -> None:
        """Begin no event any more, and return when none is handled. *graceful*: those that run may end,
        within DRAIN_SECONDS. What is not acknowledged is given back. Raises HookFailed if one doesn't end."""
        self._ending = True
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        self._order.ready.clear()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if graceful and self._running:
            await asyncio.wait(set(self._running), timeout=DRAIN_SECONDS)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=CANCEL_SECONDS)
        if self._running:
            raise HookFailed(
                self._handler.app,
                f"event handler {self._handler.durable}",
                f"does not end, {CANCEL_SECONDS:g} s after it was cancelled",
            )
        await self._puller.close()
        for item in sorted(self._order.items.values(), key=lambda each: each.sequence):
            self._puller.say(item.ack, nak())
        self._order = EventOrder()

    # --- what comes

    async def _pull(self) -> None:
        # A first delivery would hide that what was before it has been dropped.
        await self._looked.wait()
        await self._puller.run()

    def _room(self) -> int:
        return self._handler.in_flight + self._extra_room - len(self._order.items)

    def _on_delivery(self, delivery: Delivery) -> None:
        if self._ordered:
            if delivery.number > self._number + 1:
                self._unbroken_from = delivery.number
                if not self._recovering:
                    log.info("%s: an event was lost on its way; it is asked for again", self._durable.name)
                    self._recovering = True
                    self._gap.set()
            self._number = max(self._number, delivery.number)
        self._handler.lag = delivery.pending
        before = len(self._order.ready)
        _, again = self._order.deliver(delivery, hold=self._recovering or self._ending)
        if again:
            self._puller.say(again, ACK)
        self._release_workers(before)
        self._arrived.set()

    def _release_workers(self, before: int) -> None:
        for _ in range(len(self._order.ready) - before):
            self._ready.release()

    def _on_connection(self, event: Connection) -> None:
        if event is Connection.CONNECTED:
            # Acknowledgements that were on their way may be lost: they go first, in their order, so that an
            # event cannot come again while a later one of its key does not.
            for ack in self._order.done.values():
                self._puller.say(ack, ACK)

    # --- everything that is delivered is here

    async def _recover(self) -> None:
        while True:
            try:
                await self._fetch_missing()
            except BusError as error:
                await self._on_trouble(error)
                await asyncio.sleep(RECOVER_SECONDS[0])
                continue
            self._extra_room = 0
            self._recovering = False
            before = len(self._order.ready)
            self._order.release()
            self._release_workers(before)
            self._puller.look()
            await self._gap.wait()
            self._gap.clear()

    async def _fetch_missing(self) -> None:
        delay, longest = RECOVER_SECONDS
        asked = 0  # up to there all were asked for: most sequences may be of other subjects, and never come
        while True:
            info = await self._puller.info()
            self._note(info)
            here = self._order.count_up_to(info.delivered)
            if here >= info.unacknowledged and self._unbroken_from <= info.number + 1:
                self._number = max(self._number, info.number)
                return
            self._extra_room = info.unacknowledged
            for ack in list(self._order.done.values()):
                self._puller.say(ack, ACK)
            missing = list(self._order.missing(max(info.floor, asked), info.delivered, MAX_NAKS))
            for sequence in missing:
                self._puller.say(self._puller.subject_for(sequence, info), nak())
            self._puller.look()
            self._arrived.clear()
            if len(missing) == MAX_NAKS:
                asked = missing[-1]
            else:
                asked = 0  # from the start again
                await wait_at_most(self._arrived, delay)
                delay = min(longest, 2 * delay)
            await asyncio.sleep(RECOVER_SECONDS[0])

    # --- what is looked after

    def _note(self, info: ConsumerInfo) -> None:
        self._order.forget_up_to(info.floor)
        self._handler.lag, self._handler.unacknowledged = info.pending, info.unacknowledged

    async def _look(self) -> None:
        """Notice what nothing else tells of: a lost last delivery, events that were dropped unread."""
        position = 0
        while True:
            try:
                info = await self._puller.info()
                position = await self._check_dropped(info, position)
            except BusError as error:
                await self._on_trouble(error)
                if not self._looked.is_set():
                    await asyncio.sleep(RECOVER_SECONDS[1])
                    continue
            else:
                self._looked.set()
                self._note(info)
                if self._ordered and not self._recovering and info.number > self._number:
                    await self._check_numbers()
            await asyncio.sleep(LOOK_SECONDS)

    async def _on_trouble(self, error: BusError) -> None:
        """The consumer did not answer. If somebody has deleted it, it is made anew."""
        log.debug("%s: %s", self._durable.name, error)
        if error.code == CONSUMER_NOT_FOUND:
            name = f"durable consumer {self._handler.durable}"
            self._report(
                "consumer-vanished", f"{name} is gone: it is made anew, and begins where it once did"
            )
            with contextlib.suppress(BusError, EventError):
                await self._durable.declare()

    async def _check_numbers(self) -> None:
        info = await self._puller.info()
        await asyncio.sleep(RECOVER_SECONDS[1])  # what was delivered by then is here by now, or lost
        if info.number > self._number and not self._recovering:
            self._recovering = True
            self._gap.set()

    async def _check_dropped(self, info: ConsumerInfo, position: int) -> int:
        first = await self._durable.first_sequence()
        if first > max(info.delivered, position) + 1 and max(info.delivered, position) > 0:
            lost = EventsLost(
                f"durable consumer {self._handler.durable} of app {self._handler.app}",
                max(info.delivered, position) + 1,
                first - 1,
            )
            self._report("events-lost", str(lost))
            return first - 1
        return max(position, info.delivered)

    async def _keep(self) -> None:
        """What is here and not done is being worked on: the server does not deliver it again."""
        while True:
            await asyncio.sleep(self._handler.ack_wait_seconds / 3)
            for item in sorted(self._order.items.values(), key=lambda each: each.sequence):
                if item.state is not State.DELAYED:
                    self._puller.say(item.ack, IN_PROGRESS)

    # --- one event

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        while True:
            await self._ready.acquire()
            if self._ending or not self._order.ready:
                continue
            item = self._order.take()
            self._running[task] = item
            try:
                await self._handle(item)
            finally:
                del self._running[task]
            if self._ending:
                return  # a handler may have swallowed the cancellation that was to end this

    async def _handle(self, item: Item) -> None:
        handler, message = self._handler, item.message
        headers = message.headers
        if (only := headers.get(ONLY_FOR)) is not None and only != f"{handler.app}/{handler.durable}":
            self._finish(item, ACK)
            return
        if item.attempt > max(LOST_LEAST, LOST_COUNT * (handler.retries + 1)):
            await self._give_up(item, f"delivered {item.attempt} times, and no outcome is known of any try")
            return
        try:
            data = decoded(message.data, headers, handler.shape)
        except ContentError as error:
            handler.failed += 1
            await self._give_up(item, f"it cannot be read as declared: {error}")
            return
        subject = self._names.event_of(message.subject)
        event = Event(
            subject,
            data,
            sequence=item.sequence,
            time=item.time,
            key=item.key,
            attempt=item.attempt,
            headers=headers,
        )
        problem = await self._call(event)
        if problem is None:
            handler.handled += 1
            self._finish(item, ACK)
            return
        handler.failed += 1
        reason = f"{type(problem).__name__}: {problem}"
        log.error(
            "app %s: %s failed on event %s (sequence %d, attempt %d): %s",
            handler.app,
            handler.durable,
            subject,
            item.sequence,
            item.attempt,
            reason,
            exc_info=problem,
        )
        if item.attempt > handler.retries:
            await self._give_up(item, reason)
        else:
            self._delay(item, handler.retry.delay(item.attempt))

    async def _call(self, event: Event[Any]) -> BaseException | None:
        """Handle it; what it raised."""
        task = asyncio.current_task()
        cancelling = task.cancelling() if task is not None else 0
        try:
            if tracing.tracer() is None:
                await self._handler.call(event, self._context)
            else:
                with tracing.consumer_span(
                    event.subject, event.headers, group=self._handler.durable, message_id=event.id
                ):
                    await self._handler.call(event, self._context)
        except asyncio.CancelledError as error:
            if task is None or task.cancelling() > cancelling:
                raise
            return error  # its own, not ours
        except Exception as error:
            return error
        return None

    def _finish(self, item: Item, how: bytes) -> None:
        if self._order.finish(item):
            self._ready.release()
        self._puller.say(item.ack, how)
        if self._room() >= self._handler.in_flight // 2:
            self._puller.look()

    def _delay(self, item: Item, seconds: float) -> None:
        self._order.delay(item)
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle
        timer = loop.call_later(seconds + LATE_SECONDS, lambda: self._try_again(item, timer))
        self._timers.add(timer)
        self._puller.say(item.ack, nak(seconds))

    def _try_again(self, item: Item, timer: asyncio.TimerHandle) -> None:
        self._timers.discard(timer)
        if self._order.try_again(item):
            self._ready.release()

    async def _give_up(self, item: Item, reason: str) -> None:
        """A dead letter. Only when that is stored is the event acknowledged."""
        handler, message = self._handler, item.message
        subject = self._names.event_of(message.subject)
        try:
            await bury(
                self._bus,
                self._names,
                app=handler.app,
                durable=handler.durable,
                stream=self._durable.stream,
                subject=subject,
                sequence=item.sequence,
                data=message.data,
                headers=dict(message.headers),
                attempts=item.attempt,
                reason=reason,
                timeout=BURY_SECONDS,
            )
        except BusError as error:
            log.error("app %s: no dead letter of %s can be stored: %s", handler.app, subject, error)
            self._delay(item, UNBURIED_SECONDS)
            return
        handler.dead += 1
        log.error(
            "app %s: %s gave up event %s (sequence %d) after %d tries: %s; see phalanx events dead list",
            handler.app,
            handler.durable,
            subject,
            item.sequence,
            item.attempt,
            reason,
        )
        self._finish(item, TERM)


__all__ = ["EventConsumer"]
