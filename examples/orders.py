"""An app that is called by others: whoever calls does not notice on which node it runs, nor that it moves.

Run it on every node: ``phalanx run examples.orders:platform``. Then, from anywhere::

    phalanx call orders place '{"item": "apple", "count": 3}'
    phalanx call orders total '"apple"'
"""

from __future__ import annotations

import asyncio

from examples.orders_api import Order, Orders, Receipt
from phalanx import CallError, Platform, current_call

platform = Platform("prod", nats="nats://127.0.0.1:4222")
orders = platform.app("orders")


class Book(Orders):
    """Answers on the active node only. The KV is fenced: a deposed node stores nothing."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()

    async def place(self, order: Order) -> Receipt:
        """Count it."""
        if order.count < 1:
            raise CallError("nothing-ordered", "the count is to be 1 or more", path="$.count")
        kv = current_call().kv
        async with self._one_at_a_time:
            total = await kv.value(f"total.{order.item}", int, 0) + order.count
            await kv.put(f"total.{order.item}", total)
        return Receipt(order.item, total)

    async def total(self, item: str) -> int:
        """Only reads, so a call of it may be made again after a crash of the node that had begun it."""
        return await current_call().kv.value(f"total.{item}", int, 0)


orders.handle_all(Book(), Orders)

if __name__ == "__main__":
    platform.run()
