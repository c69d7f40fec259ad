"""Which of the events that are delivered may be handled now: one of each key at a time, in order.

Pure: no I/O, no clock. An item is *held* until it is known that nothing before it is missing, *waiting* while
an earlier event of its key is not done, *ready*, *running*, or *delayed* after a failure. An item without a
key waits for nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import Enum

from phalanx.messaging.event import key_of
from phalanx.messaging.event_pull import Delivery
from phalanx.ports import Message

MAX_DONE = 8192
"""Remembered events that were acknowledged: should an acknowledgement be lost, they come again."""


class State(Enum):
    """What an item waits for."""

    HELD = "held"
    WAITING = "waiting"
    READY = "ready"
    RUNNING = "running"
    DELAYED = "delayed"


class Item:
    """An event that is delivered and not acknowledged."""

    __slots__ = ("ack", "attempt", "key", "message", "sequence", "state", "time")

    def __init__(self, delivery: Delivery) -> None:
        self.message: Message = delivery.message
        self.ack, self.sequence = delivery.message.reply, delivery.sequence
        self.attempt, self.time = delivery.attempt, delivery.time
        self.key = key_of(delivery.message.headers)
        self.state = State.HELD


class EventOrder:
    """All items of one consumer, by sequence; those that are ready in ``ready``."""

    def __init__(self) -> None:
        self.items: dict[int, Item] = {}
        self.ready: deque[Item] = deque()
        self.done: dict[int, str] = {}
        """Sequences that were acknowledged, and how."""
        self._waiting: dict[str, deque[Item]] = {}
        """By key, of which one item is ready, running or delayed."""

    def deliver(self, delivery: Delivery, *, hold: bool) -> tuple[Item | None, str]:
        """An event came. What is new of it: the item, or (it was acknowledged before) how that was said.

        *hold*: it is not known whether something before it is missing.
        """
        sequence = delivery.sequence
        item = self.items.get(sequence)
        if item is not None:
            item.ack = delivery.message.reply
            if item.state is not State.DELAYED:
                return None, ""
            item.attempt = max(item.attempt + 1, delivery.attempt)
            self._make_ready(item)
            return item, ""
        if sequence in self.done:
            return None, delivery.message.reply
        item = self.items[sequence] = Item(delivery)
        if not hold:
            self._place(item)
        return item, ""

    def release(self) -> None:
        """Nothing before those that are held is missing."""
        held = sorted((i for i in self.items.values() if i.state is State.HELD), key=lambda i: i.sequence)
        for item in held:
            self._place(item)

    def _place(self, item: Item) -> None:
        if not item.key:
            self._make_ready(item)
        elif (waiting := self._waiting.get(item.key)) is None:
            self._waiting[item.key] = deque()
            self._make_ready(item)
        else:
            item.state = State.WAITING
            waiting.append(item)

    def _make_ready(self, item: Item) -> None:
        item.state = State.READY
        self.ready.append(item)

    def take(self) -> Item:
        """The next one that is ready: it runs now."""
        item = self.ready.popleft()
        item.state = State.RUNNING
        return item

    def delay(self, item: Item) -> None:
        """It failed, and is tried again later; its key waits."""
        item.state = State.DELAYED

    def try_again(self, item: Item) -> bool:
        """The time of a delay is over, and nobody has delivered it again; whether that is so."""
        if self.items.get(item.sequence) is not item or item.state is not State.DELAYED:
            return False
        item.attempt += 1
        self._make_ready(item)
        return True

    def finish(self, item: Item) -> bool:
        """It is acknowledged; whether another one became ready."""
        self.items.pop(item.sequence, None)
        self.done[item.sequence] = item.ack
        if len(self.done) > MAX_DONE:
            del self.done[next(iter(self.done))]
        waiting = self._waiting.get(item.key)
        if waiting is None:
            return False
        if not waiting:
            del self._waiting[item.key]
            return False
        self._make_ready(waiting.popleft())
        return True

    def forget_up_to(self, floor: int) -> None:
        """All up to there is acknowledged, by the server's word."""
        for sequence in [each for each in self.done if each <= floor]:
            del self.done[sequence]

    def count_up_to(self, sequence: int) -> int:
        """How many of the items have that sequence or an earlier one."""
        return sum(each <= sequence for each in self.items)

    def missing(self, floor: int, delivered: int, most: int) -> Iterable[int]:
        """Sequences after *floor* up to *delivered* that may be with somebody else: *most* of them."""
        for sequence in range(floor + 1, delivered + 1):
            if most <= 0:
                return
            if sequence not in self.items and sequence not in self.done:
                most -= 1
                yield sequence


__all__ = ["EventOrder", "Item", "State"]
