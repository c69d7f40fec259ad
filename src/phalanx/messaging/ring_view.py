"""The partitions of one ring, as a caller knows them: the newest epoch of each, followed on their watch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec

from phalanx.decide.ring_ownership import PartitionBody
from phalanx.messaging.leading import LeaderView, UnderWay
from phalanx.names import Names
from phalanx.ports import Bus, Message, Subscription

_body_of = msgspec.json.Decoder(PartitionBody).decode


class PartitionView:
    """One partition. ``epoch``: the newest one that was heard of, 0 for none; it only grows."""

    __slots__ = ("_of_ring", "epoch", "in_flight")

    def __init__(self, of_ring: LeaderView) -> None:
        self._of_ring = of_ring
        self.epoch = 0
        self.in_flight: set[UnderWay] = set()

    @property
    def idempotent(self) -> frozenset[str]:
        """The methods that may be repeated."""
        return self._of_ring.idempotent

    @property
    def is_closed(self) -> bool:
        """Whether there is no such app after all."""
        return self._of_ring.is_closed

    def is_over(self, epoch: int) -> None:
        """Whoever owned it under *epoch* says that it does not any more: the next one is heard of."""

    def learn(self, epoch: int) -> None:
        """It has an owner under *epoch*. What is under way under an older one will not be answered."""
        if epoch <= self.epoch:
            return
        self.epoch = epoch
        for each in list(self.in_flight):
            if each.epoch is not None and each.epoch < epoch:
                each.end_soon()


class RingView:
    """Those partitions of one ring that this process calls."""

    def __init__(self, bus: Callable[[], Bus], names: Names, app: str, of_ring: LeaderView) -> None:
        self._bus, self._names, self._app, self._of_ring = bus, names, app, of_ring
        self._partitions: dict[int, PartitionView] = {}
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Begin to follow. Raises BusError."""
        subject = self._names.partition_watch_subject(self._app)
        self._subscription = await self._bus().subscribe(subject, self._on_record)

    def end_calls(self) -> None:
        """All that are under way end now: nobody will take their answers."""
        for partition in self._partitions.values():
            for each in list(partition.in_flight):
                each.end_now()

    async def close(self) -> None:
        """Follow no more."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.unsubscribe()

    def of(self, partition: int) -> PartitionView:
        """That partition."""
        found = self._partitions.get(partition)
        if found is None:
            found = self._partitions[partition] = PartitionView(self._of_ring)
        return found

    def _on_record(self, message: Message) -> None:
        number, revision = self._names.last_token(message.subject), message.headers.get("Nats-Sequence", "")
        if not number.isdecimal() or not revision.isdecimal() or int(number) not in self._partitions:
            return
        with contextlib.suppress(msgspec.MsgspecError):
            if _body_of(message.data).session is not None:
                self._partitions[int(number)].learn(int(revision))


__all__ = ["PartitionView", "RingView"]
