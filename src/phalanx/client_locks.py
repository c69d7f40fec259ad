"""Locks from outside of the nodes: ``PlatformClient.lock``, held through a session of the client's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

from phalanx.client_session import ClientSession, start_session
from phalanx.client_sync import LoopThread
from phalanx.coord.lock_body import Kind
from phalanx.coord.locks import Lock, Locks, LockStatus, Semaphore
from phalanx.names import Names
from phalanx.ports import Bus


class ClientSessions:
    """The session of one client, begun when something needs it, and the locks that hang on it."""

    def __init__(self, bus: Callable[[], Bus], names: Names) -> None:
        self._bus, self._names = bus, names
        self._session: ClientSession | None = None
        self._locks: dict[str | None, Locks] = {}
        self._beginning = asyncio.Lock()

    async def locks(self, app: str | None) -> Locks:
        """The locks of *app* (None: of the platform) under a session that is valid. Raises StartError."""
        async with self._beginning:
            session = self._session
            if session is None or not session.is_valid:
                await self._end()
                session = self._session = await start_session(self._bus(), self._names)
            found = self._locks.get(app)
            if found is None:
                found = Locks(self._bus(), self._names, app, session, session.register)
                self._locks[app] = found
            return found

    async def _end(self) -> None:
        held, self._locks = self._locks, {}
        for locks in held.values():
            await locks.close()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def close(self) -> None:
        """End the session: what is held through it is lost, and free for others at once."""
        async with self._beginning:
            await self._end()


class ClientLocks:
    """The locks and semaphores of an app, or of the platform, from a client. The client's first use begins
    its session: that may raise StartError, when its login may not have one."""

    def __init__(self, sessions: ClientSessions, app: str | None) -> None:
        self._sessions, self._app = sessions, app

    @asynccontextmanager
    async def lock(self, name: str, *, timeout: float = 10.0, cancel: bool = False) -> AsyncGenerator[Lock]:
        """See :meth:`phalanx.coord.locks.Locks.lock`."""
        locks = await self._sessions.locks(self._app)
        async with locks.lock(name, timeout=timeout, cancel=cancel) as held:
            yield held

    async def acquire(self, name: str, *, timeout: float = 10.0) -> Lock:
        """See :meth:`phalanx.coord.locks.Locks.acquire`."""
        return await (await self._sessions.locks(self._app)).acquire(name, timeout=timeout)

    def semaphore(self, name: str, *, permits: int) -> Semaphore:
        """See :meth:`phalanx.coord.locks.Locks.semaphore`."""
        return Semaphore(lambda: self, name, permits)

    async def take(self, kind: Kind, name: str, permits: int, timeout: float) -> Lock:
        """See :meth:`phalanx.coord.locks.Locks.take`."""
        return await (await self._sessions.locks(self._app)).take(kind, name, permits, timeout)

    async def status(self, kind: Kind, name: str) -> LockStatus | None:
        """See :meth:`phalanx.coord.locks.Locks.status`."""
        return await (await self._sessions.locks(self._app)).status(kind, name)


class SyncLock:
    """A lock that a thread holds through a synchronous client."""

    def __init__(self, held: Lock, thread: LoopThread) -> None:
        self._held, self._thread = held, thread
        self.name, self.token = held.name, held.token

    @property
    def is_held(self) -> bool:
        """Whether it is held at this very moment, by the clock of the session."""

        async def look() -> bool:
            return self._held.is_held

        return self._thread.run(look())

    def check(self) -> None:
        """Raise LockLost if it is not held any more."""

        async def look() -> None:
            self._held.check()

        self._thread.run(look())


@contextmanager
def held_by_thread(
    acquire: Callable[[], contextlib.AbstractAsyncContextManager[Lock]], thread: LoopThread
) -> Generator[SyncLock]:
    """Hold it in a plain ``with``."""
    block = acquire()
    held = thread.run(_enter(block))
    try:
        yield SyncLock(held, thread)
    except BaseException:
        # What the block raised goes first; the lock's own loss is in the log.
        thread.run(_release(held))
        raise
    thread.run(_leave(block))


async def _enter(block: contextlib.AbstractAsyncContextManager[Lock]) -> Lock:
    return await block.__aenter__()


async def _leave(block: contextlib.AbstractAsyncContextManager[Lock]) -> None:
    await block.__aexit__(None, None, None)


async def _release(held: Lock) -> None:
    await held.release()


__all__ = ["ClientLocks", "ClientSessions", "SyncLock", "held_by_thread"]
