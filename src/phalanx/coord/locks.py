"""The app's locks: the keys under ``lock.`` of its bucket, held through the node's session.

What holds:

* At most one holder at a time, among all tasks of all nodes. A lock is taken by compare-and-set when it
  was released, when its holder's session is over (for everybody, for good), or, for a lock held in an active
  section (``ctx.lock``), when another epoch has begun. So a dead host costs the session's TTL, and a
  crashed process nothing to speak of.
* ``held.token`` is a fencing token: it only grows, also over releases, restarts and expiry. Give it to what
  the lock protects, where that can refuse an older one. The server refuses ``ctx.lock`` under an old epoch.
* A holder that is cut off loses the lock with its session: ``held.lost`` is set, ``held.check()`` raises.
  Leaving ``async with`` then raises LockLost, unless the body raises by itself.
* Tasks of one node wait in line; between nodes it is open who is next. Locks are not reentrant.
* Nothing is left behind: an acquisition that is given up or cancelled while NATS does not answer is settled
  in the background, until that is done or the session ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from phalanx import system
from phalanx.aio import Background
from phalanx.coord.codec import check_key
from phalanx.coord.lock_key import Holder, HoldingSession, LockKey, Parts, Sessions
from phalanx.coord.lock_status import LockStatus, LockWaiter, Waiting, all_statuses, status_of
from phalanx.errors import (
    BusError,
    BusTimeout,
    BusUnavailable,
    ConfigError,
    Fenced,
    LockLost,
    LockTimeout,
    SessionLost,
    WrongRevision,
)
from phalanx.names import Names
from phalanx.ports import Bus, Fence

__all__ = ["HoldingSession", "Lock", "LockStatus", "LockWaiter", "Locks", "Sessions"]

log = logging.getLogger("phalanx.locks")

RETRY_SECONDS = 0.1
SPREAD_SECONDS = 0.005
"""Those who waited for the same lock try at slightly different moments."""

RELEASED_KEPT_SECONDS = 86400
"""After a release the key stays that long. Revisions grow without it too: they are the stream's."""

RELEASE_SECONDS = 5.0
"""How long leaving a lock waits for NATS; after that the release goes on in the background."""

_encode = msgspec.json.Encoder().encode
_RELEASED = _encode(Holder())
_RELEASED_HEADERS = {"Nats-Rollup": "sub"}


class _Family:
    """What the locks of one app on one node share, whatever epoch they are taken under."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.turns: dict[str, _Turn] = {}
        self.settling = Background(log)


class _Turn:
    """Whose turn it is in this process, for one name. Kept only while somebody has or wants it."""

    def __init__(self, family: _Family, name: str) -> None:
        self._turns, self._name = family.turns, name
        self.waiting = Waiting(family.parts, name, family.settling)
        self._lock = asyncio.Lock()
        self._users = 0

    async def take(self) -> None:
        self._users += 1
        try:
            await self._lock.acquire()
        except BaseException:
            self._leave()
            raise

    def give_back(self) -> None:
        self._lock.release()
        self._leave()

    def _leave(self) -> None:
        self._users -= 1
        if not self._users:
            del self._turns[self._name]


class Lock:
    """A lock that this task holds. Made by :meth:`Locks.acquire` and ``async with locks.lock(...)``."""

    def __init__(self, family: _Family, key: LockKey, turn: _Turn, name: str, fence: Fence | None) -> None:
        self._family, self._key, self._turn, self._fence = family, key, turn, fence
        self.name = name
        self._nonce = key.holder.nonce
        self.token = key.revision
        """The fencing token: larger than that of every earlier holder."""
        self.lost = asyncio.Event()
        """Set when the lock is gone: the session or the epoch ended, or the key was overwritten."""
        self.lost_reason = ""
        self._released: asyncio.Task[None] | None = None
        key.changed = self._look
        key.watch(leader=fence is not None)
        self._look()

    @property
    def is_held(self) -> bool:
        """Whether it is held at this very moment, by the clock of the session."""
        self._look()
        return self._released is None and not self.lost.is_set()

    @property
    def is_watched(self) -> bool:
        """Whether a loss that only its key tells of would be seen: from a moment after taking it on."""
        return self._key.is_watched

    @property
    def is_released(self) -> bool:
        """Whether :meth:`release` was called."""
        return self._released is not None

    def check(self) -> None:
        """Raise LockLost if it is not held any more. Cheap: call it before each step that matters."""
        if not self.is_held:
            raise LockLost(self.name, self.lost_reason or "it was released")

    def _look(self) -> None:
        session = self._family.parts.session
        if not session.is_valid:
            self._lose(f"session {session.id} is over: {session.lost_reason or 'it ran out'}")
        elif self._fence is not None and self._key.leader_revision > self._fence.revision:
            self._lose(f"epoch {self._fence.revision} is over")
        elif self._key.revision != self.token or self._key.holder.session != session.id:
            self._lose(f"its key was overwritten, now held by {self._key.holder_text()}")

    def _lose(self, reason: str) -> None:
        if self._released is None and not self.lost.is_set():
            self.lost_reason = reason
            self.lost.set()
            log.error("lock %s (token %d) is lost: %s", self.name, self.token, reason)

    async def release(self) -> None:
        """Give it up; twice is harmless. If NATS does not answer, this goes on in the background."""
        if self._released is None:
            self._released = self._family.settling.spawn(self._release(), f"release {self.name}")
        # Cancelling the caller does not stop the release.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._released), RELEASE_SECONDS)

    async def _release(self) -> None:
        try:
            await self._key.close()
            await _settle(self._family.parts, self._key, self._nonce, self.token)
        finally:
            self._turn.give_back()


class Locks:
    """The locks of one app on one node, for one session.

    With :meth:`under` a fence the lock is taken only while that epoch lasts, and ends with it.
    """

    def __init__(self, bus: Bus, names: Names, app: str, session: HoldingSession, register: Sessions) -> None:
        self._family = _Family(Parts(bus, names, app, session, register))
        self._fence: Fence | None = None
        self._epoch = 0

    def under(self, fence: Fence, epoch: int) -> Locks:
        """The same locks, taken in the active section of *epoch* (raises Fenced once that is over)."""
        locks = Locks.__new__(Locks)
        locks._family, locks._fence, locks._epoch = self._family, fence, epoch
        return locks

    @asynccontextmanager
    async def lock(self, name: str, *, timeout: float = 10.0) -> AsyncGenerator[Lock]:
        """Hold the lock in the block: ``async with locks.lock("migrate", timeout=10) as held``.

        Raises what :meth:`acquire` raises; LockLost at the end of a block that went well although the lock
        was lost meanwhile.
        """
        held = await self.acquire(name, timeout=timeout)
        try:
            yield held
            if not held.is_released:
                held.check()
        finally:
            await held.release()

    async def acquire(self, name: str, *, timeout: float = 10.0) -> Lock:
        """Take the lock, waiting at most *timeout* seconds (0: only if it is free; inf: for ever).

        The caller releases it. Raises LockTimeout; SessionLost when the session ends meanwhile; Fenced;
        ConfigError; BusError when NATS did not answer to the end, or refuses.
        """
        check_key(name, what="lock")
        number = isinstance(timeout, int | float)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not number or not timeout >= 0:
            raise ConfigError("timeout", timeout, "is no time to wait", "give seconds, 0 or more")
        deadline = system.now() + timeout
        turn = self._family.turns.get(name)
        if turn is None:
            turn = self._family.turns[name] = _Turn(self._family, name)
        with turn.waiting:
            try:
                async with asyncio.timeout(timeout if timeout < float("inf") else None):
                    await turn.take()
            except TimeoutError:
                raise LockTimeout(name, timeout, f"{self._family.parts.session.id} (this node)") from None
            claim = _Claim(self._family, turn, name, self._fence, self._epoch)
            try:
                return await claim.run(deadline, timeout)
            except BaseException:
                claim.give_up()
                raise

    async def holder(self, name: str) -> LockStatus | None:
        """Who holds the lock, and which nodes have waited for it for a second or more; None if it is free.

        The stream's leader is asked; it is for people and monitoring: what it tells may be over when it
        arrives. A holder that has died is shown until its session is known to be over. Raises ConfigError,
        BusError.
        """
        return await status_of(self._family.parts, check_key(name, what="lock"))

    async def held(self) -> list[LockStatus]:
        """All of the app's locks that are held, by name; may be some milliseconds behind. See :meth:`holder`.
        Raises BusError."""
        return await all_statuses(self._family.parts)

    async def close(self) -> None:
        """Wait until what was released or given up is settled: at most a few seconds, then leave it."""
        await self._family.settling.close(RELEASE_SECONDS)


class _Claim:
    """One attempt to get a lock: from this task's turn until it holds the key, or gives up."""

    def __init__(self, family: _Family, turn: _Turn, name: str, fence: Fence | None, epoch: int) -> None:
        self._family, self._turn, self._name, self._fence = family, turn, name, fence
        self._parts = family.parts
        self._epoch = epoch
        self._changed = asyncio.Event()
        self._key = LockKey(family.parts, name, self._changed.set)
        self._nonce = secrets.token_hex(8)
        self._in_doubt: int | None = None
        """The revision that a write of ours, whose outcome is not known, expected."""
        self._problem: BusError | None = None
        self._key.open()

    async def run(self, deadline: float, timeout: float) -> Lock:
        waited = False
        await self._try(self._key.read)
        while True:
            self._check_right()
            self._changed.clear()
            if self._problem is None and (self._is_mine or self._key.is_free):
                if waited and not self._is_mine:
                    await asyncio.sleep(random.uniform(0, SPREAD_SECONDS))
                if self._is_mine or (self._key.is_free and await self._try(self._take)):
                    return Lock(self._family, self._key, self._turn, self._name, self._fence)
            left = deadline - system.now()
            if left <= 0:
                raise self._problem or LockTimeout(self._name, timeout, self._key.holder_text())
            self._key.watch(leader=self._fence is not None or bool(self._key.holder.epoch))
            await self._wait(left)
            waited = True
            if self._problem is not None:
                await self._try(self._key.read)

    @property
    def _is_mine(self) -> bool:
        return self._key.holder.nonce == self._nonce

    def _check_right(self) -> None:
        session = self._parts.session
        if not session.is_valid:
            raise SessionLost(str(session.id), session.lost_reason or "it ran out")
        if self._fence is not None and self._key.leader_revision > self._fence.revision:
            raise Fenced(self._parts.app, self._epoch)

    async def _try(self, step: Any) -> bool:
        """Do *step*; when NATS does not answer, note it: it is tried again until the deadline."""
        self._problem = None
        try:
            return bool(await step())
        except (BusUnavailable, BusTimeout) as error:
            self._problem = error
            return False

    async def _wait(self, left: float) -> None:
        """Until something changed; for a moment only, when NATS does not answer or a write was refused."""
        if self._problem is not None or self._key.is_free:
            await asyncio.sleep(min(left, RETRY_SECONDS * random.uniform(0.1, 1)))
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left if left < float("inf") else None):
                await self._changed.wait()

    async def _take(self) -> bool:
        """Write the key as ours. False: somebody else did, or it is not clear; look again."""
        holder = Holder(self._parts.session.id, self._nonce, self._epoch)
        expect = self._in_doubt = self._key.revision
        try:
            revision = await self._parts.bus.write(
                self._key.subject, _encode(holder), expect=expect, fence=self._fence
            )
        except (WrongRevision, BusTimeout) as error:
            # Neither proves anything about who wrote: the nonce does.
            await self._key.read()
            if self._key.revision != expect and not self._is_mine:
                self._in_doubt = None  # whatever is still on its way will be refused
            await self._check_fence()
            if self._in_doubt is not None and not self._is_mine and isinstance(error, BusTimeout):
                raise
            return self._is_mine
        except BusUnavailable:
            raise
        except BusError:
            self._in_doubt = None
            raise
        self._in_doubt = None
        self._key.learn(revision, holder)
        return self._is_mine

    async def _check_fence(self) -> None:
        if self._fence is not None and await self._key.read_leader() != self._fence.revision:
            raise Fenced(self._parts.app, self._epoch)

    def give_up(self) -> None:
        """Leave nothing behind, also of a write that is still on its way."""
        self._family.settling.spawn(self._abandon(), f"give up {self._name}")

    async def _abandon(self) -> None:
        try:
            await self._key.close()
            if self._in_doubt is not None:
                await _settle(self._parts, self._key, self._nonce, self._in_doubt)
        finally:
            self._turn.give_back()


async def _settle(parts: Parts, key: LockKey, nonce: str, revision: int) -> None:
    """Make sure that *nonce* does not hold the key, and will not: write it free over *revision*.

    If a write of that nonce which expected *revision* is still on its way, the server refuses it then.
    Tries until the session ends, since with it whatever we hold ends too.
    """
    while parts.session.is_valid:
        try:
            try:
                await parts.bus.write(
                    key.subject,
                    _RELEASED,
                    expect=revision,
                    headers=_RELEASED_HEADERS,
                    ttl_seconds=RELEASED_KEPT_SECONDS,
                )
            except WrongRevision:
                await key.read()
                if key.revision != revision and key.holder.nonce != nonce:
                    return
                revision = key.revision
                continue
        except BusError as error:
            if not isinstance(error, BusUnavailable | BusTimeout):
                log.error("lock %s cannot be released: %s", key.subject, error)
                return
            log.debug("lock %s: not settled yet: %s", key.subject, error)
            await asyncio.sleep(RETRY_SECONDS)
            continue
        return
