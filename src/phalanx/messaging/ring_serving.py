"""The calls to a ring on one node: those to a partition are answered by its owner alone, under its epoch."""

from __future__ import annotations

from typing import Any

from phalanx.messaging import call_wire as wire
from phalanx.messaging.handlers import Handlers
from phalanx.messaging.serving import CallServer
from phalanx.names import Names
from phalanx.ports import Bus


class RingCallServer(CallServer):
    """What does not go to one partition: Node and Any, for methods that are declared ``anywhere``, and who
    asks how many partitions there are."""

    def __init__(
        self, app: str, node: str, handlers: Handlers, bus: Bus, names: Names, kv: Any, partitions: int
    ) -> None:
        super().__init__(app, node, handlers, bus, names, kv)
        self._leading = wire.Leading("", 0, handlers.idempotent, "ring", partitions)
        self._micro.is_ring = True

    async def open(self) -> None:
        """See :meth:`CallServer.open`."""
        await super().open()
        if not self._handlers:
            # Else whoever calls would wait for an owner that answers.
            subject = self._names.call_partition_subject(self._app, "*")
            queue = self._names.call_queue(self._app)
            await self._answer(subject, self._on_any, queue)

    def on_leader(self, node: str | None, epoch: int) -> None:
        """Nobody leads a ring."""

    def _passive(self, method: str, *, node_route: bool) -> tuple[str, str]:
        problem = f"only the owner of a key's partition answers {method}; call it with to=Key(key)"
        return "wrong-route", f"{problem}, or declare it with anywhere=True"

    def of_partition(self, partition: int) -> PartitionCalls | None:
        """What answers the calls to *partition* while it is owned here; None: the app has no handlers."""
        return PartitionCalls(self, partition) if self._handlers else None


class PartitionCalls(CallServer):
    """The calls to one partition, between ``begin`` and ``end`` of one time of owning it."""

    def __init__(self, ring: RingCallServer, partition: int) -> None:
        super().__init__(ring._app, ring._node, ring._handlers, ring._bus, ring._names, ring._kv)
        self._partition = partition
        self._by_id = ring._by_id  # cancellations come to the node, whatever the partition

    def _route_of_section(self) -> str:
        return self._names.call_partition_subject(self._app, self._partition)


__all__ = ["PartitionCalls", "RingCallServer"]
