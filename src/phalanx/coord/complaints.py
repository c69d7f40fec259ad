"""What is tried again and again while NATS has no leader, in the log: told once, then ever more rarely."""

from __future__ import annotations

import logging

from phalanx.errors import BusError


class Complaints:
    """Those of one app; :meth:`clear` once NATS is well again."""

    def __init__(self, log: logging.Logger, app: str) -> None:
        self._log, self._app = log, app
        self._counts: dict[str, int] = {}

    def tell(self, what: str, error: BusError) -> None:
        """*what* has not worked: a warning for the first, second, fourth … time in a row."""
        self._counts[what] = count = self._counts.get(what, 0) + 1
        level = logging.WARNING if count & (count - 1) == 0 else logging.DEBUG
        tries = f" (try {count})" if count > 1 else ""
        self._log.log(level, "app %s: %s: %s%s", self._app, what, error, tries)

    def clear(self) -> None:
        """It works again: the next time is a first one."""
        self._counts.clear()


__all__ = ["Complaints"]
