"""Entries of the log that were pushed to a follower and wait for their turn, within bounds."""

from __future__ import annotations

from phalanx import system
from phalanx.data.entries import LogEntry, LogRecord

MAX_PUSHED = 4096
MAX_PUSHED_BYTES = 16 << 20


class Pushed:
    """By sequence, each with the moment when it came. What does not fit is dropped: the log has it, too."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[LogEntry, float]] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._entries

    def add(self, entry: LogEntry) -> None:
        """Keep *entry*, if there is room. The newest one counts where a sequence comes twice."""
        self.take(entry.sequence)
        size = entry_size(entry)
        if len(self._entries) < MAX_PUSHED and self.bytes + size <= MAX_PUSHED_BYTES:
            self._entries[entry.sequence] = (entry, system.now())
            self.bytes += size

    def take(self, sequence: int) -> tuple[LogEntry, float] | None:
        """Give out the entry with that sequence and when it came, or None."""
        found = self._entries.pop(sequence, None)
        if found is not None:
            self.bytes -= entry_size(found[0])
        return found

    def clear(self) -> None:
        """Drop all."""
        self._entries.clear()
        self.bytes = 0


def entry_size(entry: LogEntry) -> int:
    """How much of the message's body it holds, in bytes."""
    return len(entry.data) if isinstance(entry, LogRecord) else 0
