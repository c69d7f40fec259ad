"""What keeper and warden have in common: nothing that comes from outside may end them or hold them up."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

from phalanx.observe.logs import plain_handler, unblock_stderr

log = logging.getLogger("phalanx.keeper")


def ignore_signals() -> None:
    """A terminal's Ctrl-C and a service manager's SIGTERM reach the whole group, but they must outlive the
    node: they end only by its word or its death."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def log_without_waiting() -> None:
    """Have nothing that is written to standard error hold this process up: a log that nobody reads would
    keep it from fencing, and one that only holds the session would go on being alive for its node."""
    unblock_stderr()
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.handlers = [plain_handler()]


def harden() -> None:
    """Make it unlikely that the kernel stops or kills this process before others. Best effort."""
    path = Path("/proc/self/oom_score_adj")
    try:
        path.write_text("-900")
    except OSError as error:
        log.debug("%s: %s", path, error)
    try:
        os.nice(-10)
    except OSError as error:
        log.debug("nice: %s", error)
