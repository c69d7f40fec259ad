"""What Litestream says: one JSON object a line."""

from __future__ import annotations

import logging

import msgspec

from phalanx import system

log = logging.getLogger("phalanx.capture")

_EXPECTED = ("retention disabled", "monitor error", "replica sync")
"""Messages that only say what was configured above."""
_LEVELS = {"WARN": logging.WARNING, "ERROR": logging.ERROR}


class Messages:
    """Litestream's log lines (JSON): warnings and errors go to our log, at most some in a while."""

    LIMIT = 20
    PERIOD_SECONDS = 10.0

    def __init__(self, logger: logging.Logger = log) -> None:
        self._logger = logger
        self._since, self._count = 0.0, 0

    def take(self, line: str) -> str:
        """The message of *line* if it is worth to be repeated, else an empty string."""
        level, text = _parse(line)
        if any(expected in text for expected in _EXPECTED):
            level = logging.DEBUG
        if level >= logging.WARNING and not self._may():
            level = logging.DEBUG
        self._logger.log(level, "Litestream: %s", text)
        return text if level >= logging.WARNING else ""

    def _may(self) -> bool:
        now = system.now()
        if now - self._since > self.PERIOD_SECONDS:
            if self._count > self.LIMIT:
                self._logger.warning("Litestream: %d more messages", self._count - self.LIMIT)
            self._since, self._count = now, 0
        self._count += 1
        return self._count <= self.LIMIT


def _parse(line: str) -> tuple[int, str]:
    try:
        entry = msgspec.json.decode(line.encode(), type=dict[str, object])
    except (msgspec.DecodeError, UnicodeEncodeError):
        # No JSON: a panic, a wrong configuration.
        return logging.WARNING, line
    level = _LEVELS.get(str(entry.pop("level", "")), logging.DEBUG)
    text = str(entry.pop("msg", ""))
    for name in ("time", "system", "db", "subsystem"):
        entry.pop(name, None)
    return level, text + "".join(f" {name}={value}" for name, value in entry.items())
