"""The last resort against running on after the session's end: a timer of the kernel that kills the process.

While active sections run, a SIGALRM is set for a moment shortly before the session's end, and moved with
every renewal. Its default action ends the process, also when the event loop is blocked and the keeper is
gone, and, after the whole host was stopped, before the process executes anything again. It is used only
where Phalanx owns the process (``Platform.run()``): setitimer(2) has one such timer for each process.
"""

from __future__ import annotations

import signal
import threading

from phalanx import system


class Alarm:
    """ITIMER_REAL, set only while something is active. A disabled one does nothing."""

    def __init__(self) -> None:
        self._enabled = False
        self._sections = 0
        self._moment = float("inf")

    def enable(self) -> None:
        """Take the process's timer. Raises RuntimeError outside of the main thread, or if it is in use."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("only the main thread may use SIGALRM")
        if signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL or signal.getitimer(signal.ITIMER_REAL)[0]:
            raise RuntimeError("SIGALRM is in use by other code of this process")
        self._enabled = True

    def begin(self) -> None:
        """An active section begins."""
        self._sections += 1
        self._set()

    def end(self) -> None:
        """An active section has ended."""
        self._sections -= 1
        self._set()

    def move(self, moment: float) -> None:
        """The session was renewed: the alarm is due at *moment* (``system.now()``'s clock)."""
        self._moment = moment
        if self._sections:
            self._set()

    def _set(self) -> None:
        if not self._enabled:
            return
        if not self._sections or self._moment == float("inf"):
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            return
        # Zero would clear the timer: a moment that has passed must not.
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self._moment - system.now()))
