"""Locks and semaphores: keys of an app's bucket, or the platform's, held through the node's session.

What holds:

* At most one holder of a lock at a time, at most *permits* of a semaphore, among all tasks of all nodes. A
  permit is granted by compare-and-set when it was released, when its holder's session is over (for everybody,
  for good), or, for one held in an active section (``ctx.lock``), when another epoch has begun. So a dead
  host costs the session's TTL, and a crashed process nothing to speak of.
* ``held.token`` is a fencing token: it only grows, also over releases, restarts and expiry. Give it to what
  the lock protects, where that can refuse an older one. The server refuses ``ctx.lock`` under an old epoch.
* A holder that is cut off loses the lock with its session: ``held.lost`` is set, ``held.check()`` raises.
  Leaving ``async with`` then raises LockLost, unless the body raises by itself.
* First come, first served, among all tasks of all nodes: who waits stands in a queue in the key itself, and
  whoever releases hands over to the first of it. Locks are not reentrant.
* Nothing is left behind: an acquisition that is given up or cancelled while NATS does not answer is settled
  in the background, until that is done or the session ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from phalanx import system
from phalanx.aio import Background, wait_at_most
from phalanx.coord.codec import check_key
from phalanx.coord.lock_body import Kind
from phalanx.coord.lock_claim import Claim, HoldingSession, Parts
from phalanx.coord.lock_key import LockKey
from phalanx.coord.lock_status import LockHolder, LockStatus, LockWaiter, all_statuses, status_of
from phalanx.coord.noted_sessions import Judges
from phalanx.decide.lock import Entry
from phalanx.errors import ConfigError, LockLost, LockTimeout
from phalanx.names import Names
from phalanx.ports import Bus, Fence

__all__ = [
    "HoldingSession",
    "Lock",
    "LockHolder",
    "LockStatus",
    "LockWaiter",
    "Locks",
    "Semaphore",
]

log = logging.getLogger("phalanx.locks")

RELEASE_SECONDS = 5.0
"""How long leaving a lock waits for NATS; after that the release goes on in the background."""

MOST_PERMITS = 1000
"""Of a semaphore: all its holders stand in one key."""


class _Family:
    """What the locks of one app on one node share, whatever epoch they are taken under."""

    def __init__(
        self, bus: Bus, names: Names, app: str | None, session: HoldingSession, register: Judges
    ) -> None:
        self.mark = f"{secrets.token_hex(4)}-"
        self.settling = Background(log)
        self.parts = Parts(bus, names, app, session, register, self.settling, self.mark)
        self._numbers = itertools.count(1)
        self._keys: dict[tuple[Kind, str], LockKey] = {}

    def nonce(self) -> str:
        """Of a new claim."""
        return f"{self.mark}{next(self._numbers):x}"

    def key(self, kind: Kind, name: str, permits: int) -> LockKey:
        """The key of that name. Raises ConfigError where this process uses it with other *permits*."""
        key = self._keys.get((kind, name))
        if key is None:
            key = self._keys[kind, name] = LockKey(self.parts, kind, name, permits, self._forget)
        elif key.permits != permits:
            if key.claims:
                raise ConfigError(
                    "permits",
                    permits,
                    f"semaphore {name} is used with {key.permits} permits in this process",
                    "declare the same everywhere; it may change while nobody holds it or waits",
                )
            key.permits = permits
        return key

    def _forget(self, key: LockKey) -> None:
        del self._keys[key.kind, key.name]
        self.settling.spawn(key.close(), f"forget {key.name}")

    async def close(self) -> None:
        """Settle what was given up, for a few seconds at most; then let go of everything."""
        deadline = system.now() + RELEASE_SECONDS
        for key in list(self._keys.values()):
            await key.settle(deadline)
        for key in list(self._keys.values()):
            await key.close()
        self._keys.clear()
        await self.settling.close(max(0.0, deadline - system.now()))


class Lock:
    """A lock, or a permit of a semaphore, that this task holds. Made by :meth:`Locks.acquire` and
    ``async with locks.lock(...)``."""

    def __init__(self, key: LockKey, claim: Claim) -> None:
        self._key, self._claim = key, claim
        self.name = key.name
        self.token = claim.token
        """The fencing token: larger than that of every earlier holder."""
        self.lost = claim.lost
        """Set when the lock is gone: the session or the epoch ended, or it was taken away."""
        self._released = False

    @property
    def lost_reason(self) -> str:
        """Why it is lost; empty while it is not."""
        return self._claim.lost_reason

    @property
    def is_held(self) -> bool:
        """Whether it is held at this very moment, by the clock of the session."""
        self._key.look()
        return not self._released and self._claim.is_held

    @property
    def is_watched(self) -> bool:
        """Whether a loss that only its key tells of would be seen: from a moment after taking it on."""
        return self._key.is_watched

    @property
    def is_released(self) -> bool:
        """Whether :meth:`release` was called."""
        return self._released

    def check(self) -> None:
        """Raise LockLost if it is not held any more. Cheap: call it before each step that matters."""
        if not self.is_held:
            raise LockLost(self.name, self.lost_reason or "it was released")

    async def release(self) -> None:
        """Give it up; twice is harmless. If NATS does not answer, this goes on in the background."""
        if not self._released:
            self._released = True
            await self._key.remove(self._claim, RELEASE_SECONDS)


class _Cancelling:
    """Cancels the task of a block when its lock is lost."""

    def __init__(self, held: Lock) -> None:
        self._held, self._block = held, asyncio.current_task()
        self.has_cancelled = False
        self._watching = asyncio.create_task(self._watch(), name=f"loss of {held.name}")

    async def _watch(self) -> None:
        await self._held.lost.wait()
        if self._block is not None and not self._held.is_released:
            self.has_cancelled = True
            self._block.cancel()

    async def close(self) -> None:
        """The block is over."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    @property
    def is_sole_reason(self) -> bool:
        """Whether the block's task was cancelled by this, and by nobody else; takes that back."""
        return self.has_cancelled and self._block is not None and self._block.uncancel() == 0


class Locks:
    """The locks and semaphores of one app (None: of the platform) on one node, for one session.

    With :meth:`under` a fence a lock is taken only while that epoch lasts, and ends with it.
    """

    def __init__(
        self, bus: Bus, names: Names, app: str | None, session: HoldingSession, register: Judges
    ) -> None:
        self._family = _Family(bus, names, app, session, register)
        self._fence: Fence | None = None
        self._epoch = 0

    def under(self, fence: Fence, epoch: int) -> Locks:
        """The same locks, taken in the active section of *epoch* (raises Fenced once that is over)."""
        locks = Locks.__new__(Locks)
        locks._family, locks._fence, locks._epoch = self._family, fence, epoch
        return locks

    @asynccontextmanager
    async def lock(self, name: str, *, timeout: float = 10.0, cancel: bool = False) -> AsyncGenerator[Lock]:
        """Hold the lock in the block: ``async with locks.lock("migrate", timeout=10) as held``.

        Raises what :meth:`acquire` raises; LockLost at the end of a block that went well although the lock
        was lost meanwhile. *cancel*: the block is cancelled as soon as the lock is lost, which raises
        LockLost.
        """
        async with _block(await self.acquire(name, timeout=timeout), cancel=cancel) as held:
            yield held

    async def acquire(self, name: str, *, timeout: float = 10.0) -> Lock:
        """Take the lock, waiting at most *timeout* seconds (0: only if it is free; inf: for ever).

        The caller releases it. Raises LockTimeout; SessionLost when the session ends meanwhile; Fenced;
        ConfigError; BusError when NATS did not answer to the end, or refuses.
        """
        check_key(name, what="lock")
        return await self.take(Kind.LOCK, name, 1, timeout)

    def semaphore(self, name: str, *, permits: int) -> Semaphore:
        """The semaphore with that name: at most *permits* (1 to 1000) are held at a time. Raises
        ConfigError."""
        return Semaphore(lambda: self, name, permits)

    async def take(self, kind: Kind, name: str, permits: int, timeout: float) -> Lock:
        """See :meth:`acquire`, of either kind. *name* and *permits* have been checked."""
        number = isinstance(timeout, int | float)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not number or not timeout >= 0:
            raise ConfigError("timeout", timeout, "is no time to wait", "give seconds, 0 or more")
        deadline = system.now() + timeout
        key = self._family.key(kind, name, permits)
        entry = Entry(self._family.parts.session.id, self._family.nonce(), self._epoch, 0, system.wall())
        claim = Claim(entry, self._fence, only_now=timeout == 0)
        try:
            await key.add(claim)
            while claim.waits:
                left = deadline - system.now()
                # One that does not wait is answered by the first attempt that comes to something, or to
                # nothing.
                if left <= 0 and not claim.only_now:
                    raise key.problem or LockTimeout(name, timeout, key.holder_text())
                await wait_at_most(claim.settled, left if 0 < left < float("inf") else None)
            if claim.error is not None:
                raise claim.error
            await key.confirm(claim)
        except BaseException:
            key.drop(claim)
            raise
        return Lock(key, claim)

    async def holder(self, name: str) -> LockStatus | None:
        """Who holds the lock, and who waits for it; None if it is free.

        The stream's leader is asked; it is for people and monitoring: what it tells may be over when it
        arrives. A holder that has died is shown until its session is known to be over. Raises ConfigError,
        BusError.
        """
        return await self.status(Kind.LOCK, check_key(name, what="lock"))

    async def status(self, kind: Kind, name: str) -> LockStatus | None:
        """See :meth:`holder`, of either kind."""
        return await status_of(self._family.parts, kind, name)

    async def held(self) -> list[LockStatus]:
        """All locks and semaphores that are held, by name; may be some milliseconds behind. See
        :meth:`holder`. Raises BusError."""
        return await all_statuses(self._family.parts)

    async def is_current(self, name: str, token: int) -> bool:
        """Whether *token* is that of the lock's present holder, by the word of the stream's leader: for what
        is given tokens, and has not seen a later one. Raises ConfigError, BusError."""
        found = await self.holder(name)
        return found is not None and token in [each.token for each in found.holders]

    async def close(self) -> None:
        """Wait until what was released or given up is settled: at most a few seconds, then leave it."""
        await self._family.close()


class Source(Protocol):
    """Where a semaphore takes its permits from: :class:`Locks`, or a client's."""

    async def take(self, kind: Kind, name: str, permits: int, timeout: float) -> Lock: ...
    async def status(self, kind: Kind, name: str) -> LockStatus | None: ...


class Semaphore:
    """At most ``permits`` holders at a time, among all tasks of all nodes:
    ``async with semaphore.hold(timeout=30) as held``. Each holder is a :class:`Lock` with a token of its
    own."""

    def __init__(self, locks: Callable[[], Source], name: str, permits: int) -> None:
        check_key(name, what="semaphore")
        whole = isinstance(permits, int) and not isinstance(permits, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not whole or not 1 <= permits <= MOST_PERMITS:
            raise ConfigError(
                "permits", permits, "is no number of permits", f"give a whole number from 1 to {MOST_PERMITS}"
            )
        self._locks, self.name, self.permits = locks, name, permits

    @asynccontextmanager
    async def hold(self, *, timeout: float = 10.0, cancel: bool = False) -> AsyncGenerator[Lock]:
        """Hold a permit in the block. See :meth:`Locks.lock`."""
        async with _block(await self.acquire(timeout=timeout), cancel=cancel) as held:
            yield held

    async def acquire(self, *, timeout: float = 10.0) -> Lock:
        """Take a permit. See :meth:`Locks.acquire`; raises ConfigError also where the semaphore is held, or
        waited for, with another number of permits."""
        return await self._locks().take(Kind.SEMAPHORE, self.name, self.permits, timeout)

    async def holders(self) -> LockStatus | None:
        """Who holds permits, and who waits; None if nobody does. See :meth:`Locks.holder`."""
        return await self._locks().status(Kind.SEMAPHORE, self.name)


@asynccontextmanager
async def _block(held: Lock, *, cancel: bool) -> AsyncGenerator[Lock]:
    """The block in which *held* is held."""
    cancelling = _Cancelling(held) if cancel else None
    try:
        yield held
        if not held.is_released:
            held.check()
    except asyncio.CancelledError:
        if cancelling is not None and cancelling.is_sole_reason:
            raise LockLost(held.name, held.lost_reason) from None
        raise
    finally:
        if cancelling is not None:
            await cancelling.close()
        await held.release()
