"""The keeper's wardens, one after the other, and the lock that it holds together with them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from phalanx import system
from phalanx.aio import Background
from phalanx.keeper import wire
from phalanx.keeper.link import NodeLink
from phalanx.keeper.warden import RESPAWN_SECONDS, Warden, take_lock

log = logging.getLogger("phalanx.keeper")


class Wardens:
    """Sees to it that there is a warden as long as anything may be registered. One that dies is replaced."""

    def __init__(self, warden: Warden, link: NodeLink) -> None:
        self._link = link
        self._warden: Warden | None = warden
        self._lock: system.FileLock | None = None
        self._background = Background(log)
        self._replacing: asyncio.Task[None] | None = None
        self._state_dir: Path | None = None
        self._node: system.ProcessRef | None = system.ProcessRef.of(link.process.pid)

    async def take_lock(self, state_dir: Path) -> None:
        """Wait until nobody of an earlier life kills anything any more. Raises TimeoutError."""
        self._lock = await take_lock(state_dir)

    def instruct(self, state_dir: Path) -> None:
        """Have it kill what is registered, should this process die; and be told if it dies itself."""
        self._state_dir = state_dir
        if self._warden is not None:
            self._warden.watch(lambda: self._on_death(state_dir))
            self._tell(self._warden, state_dir)

    def on_node(self, pid: int | None) -> None:
        """There is that node from now on. None: there is none, and a warden looks whether we stand still."""
        self._node = system.ProcessRef.of(pid) if pid is not None else None
        if self._warden is not None and self._state_dir is not None:
            self._tell(self._warden, self._state_dir)

    def _tell(self, warden: Warden, state_dir: Path) -> None:
        try:
            warden.tell(state_dir, self._lock, self._node)
        except OSError as error:
            log.debug("the warden is dead: %s", error)  # the watch tells of it

    def _on_death(self, state_dir: Path) -> None:
        if self._warden is not None:
            problem = f"the warden (process {self._warden.pid}) has ended: {self._warden.reap()}"
            log.error("%s; another one is started", problem)
            self._link.say(wire.Noted("warden-exited", problem))
            self._warden = None
            self._replacing = self._background.spawn(self._replace(state_dir), "keeper warden")

    async def _replace(self, state_dir: Path) -> None:
        while self._warden is None:
            await asyncio.sleep(RESPAWN_SECONDS)
            try:
                self._warden = await asyncio.to_thread(Warden.spawn)
            except OSError as error:
                log.error("no warden can be started: %s", error)
        self.instruct(state_dir)

    def dismiss(self) -> None:
        """Nothing is left that it would have to kill, and nothing is registered any more."""
        self.close()
        if self._warden is not None:
            self._warden.goodbye()
        if self._lock is not None:
            self._lock.release()

    def close(self) -> None:
        """Replace none any more. One that was not dismissed kills once this process has ended."""
        if self._replacing is not None:
            self._replacing.cancel()


__all__ = ["Wardens"]
