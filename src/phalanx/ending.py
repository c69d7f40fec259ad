"""The end of a process that Phalanx owns: it comes, whatever code of the user's still runs in it.

A hook that hangs in a thread, a coroutine that swallows its cancellation, a blocked event loop: Python
waits for all of them, for ever. Here are the bounds. To end the process in the midst of something is safe at
any moment: for everybody else it is a crash, and the keeper, where it lives, kills what was registered
before it ends the session.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

log = logging.getLogger("phalanx")

EXIT_FAILED = 1

SECOND_SIGNAL_SECONDS = 5.0
"""How long a process goes on after a second SIGTERM or SIGINT: more than fencing takes, and a lame duck."""

FLUSH_SECONDS = 1.0


def leave(code: int) -> NoReturn:
    """End the process with *code* now, waiting for nobody: no thread, no task, no atexit function.

    Logs and standard streams are flushed, for a second at most.
    """
    flushing = threading.Thread(target=_flush, name="phalanx-flush", daemon=True)
    flushing.start()
    flushing.join(FLUSH_SECONDS)
    os._exit(code)


def _flush() -> None:
    with contextlib.suppress(Exception):  # whatever a user's handler raises
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


class Ending:
    """What bounds the end of one process. Use it in the main thread."""

    def __init__(self) -> None:
        self._signals = 0
        self._called_off = False

    def listen(self, numbers: Sequence[signal.Signals]) -> None:
        """Count these signals, also while the event loop is blocked; the loop's own handlers stay.

        Call it after ``loop.add_signal_handler``: the loop hears of a signal by its wakeup descriptor, and
        what it has set as the handler does nothing. The loop's end takes both away.
        """
        for number in numbers:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 2:
            self._within(SECOND_SIGNAL_SECONDS, "asked twice", for_good=True)

    def within(self, seconds: float, why: str) -> None:
        """The process ends within *seconds*, with exit code 1, unless :meth:`call_off` comes first."""
        self._within(seconds, why, for_good=False)

    def call_off(self) -> None:
        """The end has come by itself. A second signal's bound stays: that is about the process as a whole."""
        self._called_off = True

    def _within(self, seconds: float, why: str, *, for_good: bool) -> None:
        # A thread for each, and no lock: this may run in a signal handler.
        threading.Thread(
            target=self._end_after, args=(seconds, why, for_good), name="phalanx-ending", daemon=True
        ).start()

    def _end_after(self, seconds: float, why: str, for_good: bool) -> None:
        time.sleep(seconds)
        if for_good or not self._called_off:
            log.critical("the process does not end (%s): ending it now, after %g s", why, seconds)
            leave(EXIT_FAILED)
