"""Who waits until all that was committed before is captured."""

from __future__ import annotations

import asyncio

from phalanx.errors import DatabaseError

Waiters = list["asyncio.Future[int]"]


class Barrier:
    """Those who wait for the next sync. A sync takes them as it begins: who comes later waits for another."""

    def __init__(self) -> None:
        self._waiters: Waiters = []

    def __bool__(self) -> bool:
        return bool(self._waiters)

    def enter(self) -> asyncio.Future[int]:
        """One more; the result will be the last captured transaction. To be left by :meth:`leave`."""
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    def leave(self, waiter: asyncio.Future[int]) -> None:
        """Whether it got its answer or not."""
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    def take(self) -> Waiters:
        """All who are here now, to be answered or put back."""
        taken, self._waiters = self._waiters, []
        return taken

    def put_back(self, waiters: Waiters) -> None:
        """They wait for the next sync."""
        self._waiters = waiters + self._waiters

    def refuse(self, error: DatabaseError) -> None:
        """There will be no answer."""
        for waiter in self.take():
            if not waiter.done():
                waiter.set_exception(error)


def answer(waiters: Waiters, txid: int) -> None:
    """All up to *txid* is captured."""
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(txid)
