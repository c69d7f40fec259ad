"""An app that is called by others: whoever calls does not notice on which node it runs, nor that it moves.

Run it on every node: ``phalanx run examples.orders:platform``. Then, from anywhere::

    phalanx call orders place '{"item": "apple", "count": 3}'
    phalanx call orders total '"apple"'
"""

from __future__ import annotations

import msgspec

from phalanx import CallContext, CallError, Platform

platform = Platform("prod", nats="nats://127.0.0.1:4222")
orders = platform.app("orders")


class Order(msgspec.Struct):
    """What is asked for."""

    item: str
    count: int = 1


class Receipt(msgspec.Struct):
    """What comes back: how many of it were ordered by now."""

    item: str
    total: int


@orders.handle("place", concurrency=1)
async def place(order: Order, ctx: CallContext) -> Receipt:
    """Runs on the active node only, one at a time. ``ctx.kv`` is fenced: a deposed node stores nothing."""
    if order.count < 1:
        raise CallError("nothing-ordered", "the count is to be 1 or more", path="$.count")
    total = await ctx.kv.value(f"total.{order.item}", int, 0) + order.count
    await ctx.kv.put(f"total.{order.item}", total)
    return Receipt(order.item, total)


@orders.handle("total", idempotent=True)
async def total(item: str, ctx: CallContext) -> int:
    """Only reads, so a call of it may be made again after a crash of the node that had begun it."""
    return await ctx.kv.value(f"total.{item}", int, 0)


if __name__ == "__main__":
    platform.run()
