"""What the app in orders.py does, as both sides of its calls see it."""

from __future__ import annotations

from typing import Protocol

import msgspec

from phalanx import method


class Order(msgspec.Struct):
    """What is asked for."""

    item: str
    count: int = 1


class Receipt(msgspec.Struct):
    """What comes back: how many of it were ordered by now."""

    item: str
    total: int


class Orders(Protocol):
    """Each method is a call: ``client.api("orders").stub(Orders)`` makes them."""

    async def place(self, order: Order) -> Receipt:
        """Take an order. Refused with ``nothing-ordered`` for a count below 1."""
        ...

    @method(idempotent=True)
    async def total(self, item: str) -> int:
        """How many of *item* were ordered."""
        ...
