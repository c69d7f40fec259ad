"""A program that the node's holder has started: watched and read by the node, as one of its own children.

The counterpart of :class:`phalanx.child.Child` for a process whose parent is somebody else.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from phalanx import child, system

log = logging.getLogger("phalanx.backend")

CODE_SECONDS = 1.0
"""A program that has ended and whose exit code the holder does not tell within that has ended somehow."""


class HeldProcess:
    """``exited`` is set once it has ended, and ``how`` then says how.

    Until :meth:`reap` the holder keeps it as a zombie, so its pid can't become somebody else's. When the
    holder has ended that is over, and nothing is signalled by its number alone any more.
    """

    def __init__(
        self,
        ref: system.ProcessRef,
        output: int,
        on_forget: Callable[[], None],
        on_line: Callable[[str], None],
        on_exit: Callable[[], None],
    ) -> None:
        self.pid, self.start_time = ref
        self._ref, self._on_forget, self._on_exit = ref, on_forget, on_exit
        self.exited = asyncio.Event()
        self.how, self.code = "", 0
        self.output = child.Output(os.fdopen(output, "rb", 0), on_line)
        self._is_held, self._is_reaped = True, False
        self._timer: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None
        self._end_watch = system.watch_exit(self.pid, self._on_gone)
        if self._end_watch is None:
            self._watching = asyncio.create_task(self._watch(), name=f"watch process {self.pid}")

    async def _watch(self) -> None:
        await system.wait_exit(self.pid)
        self._on_gone()

    def _on_gone(self) -> None:
        """The kernel says that it has ended; its holder says how, unless it stands still."""
        if not self.exited.is_set() and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                CODE_SECONDS, self._end, "ended, its holder does not say how", -1
            )

    def on_code(self, code: int) -> None:
        """The holder says how it has ended."""
        self._end(child.how_ended(code), code)

    def on_holder_gone(self) -> None:
        """Nobody will say how it ends, and the kernel ends it with its holder, as a rule."""
        self._is_held = False
        self._end("its holder has ended, and the kernel has ended it with that", -1)

    def _end(self, how: str, code: int) -> None:
        if self.exited.is_set():
            return
        self.how, self.code = how, code
        self.exited.set()
        self._on_exit()

    def look(self) -> bool:
        """Whether it has ended, as far as is known now; how may be told a moment later."""
        return self.exited.is_set() or not self._ref.alive()

    def signal_group(self, number: int) -> None:
        """Signal the program and all of its process group; nothing once its pid may be another's."""
        if not self._is_reaped and (self._is_held or self._ref.alive()):
            system.kill_group(self.pid, number)

    def reap(self) -> None:
        """Let go of a program that has ended: its pid, and what is left in its pipe. Twice is harmless."""
        self.leave()
        # Whoever killed it may be quicker than the holder's word, which nobody hears from now on.
        self._end("has ended", -1)
        if not self._is_reaped:
            self._is_reaped = True
            self._on_forget()

    def leave(self) -> None:
        """Neither watch nor read it any more, and let it run. Twice is harmless."""
        if self._timer is not None:
            self._timer.cancel()
        if self._end_watch is not None:
            self._end_watch()
        if self._watching is not None:
            self._watching.cancel()
        self.output.close()
