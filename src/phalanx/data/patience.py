"""How long to wait for an answer before one looks what has become of a write.

A message to a stream is lost without a word when the stream's leader moves at that moment. Whoever waits for
its answer as long as a slow server may need stands still for that long. So the first deadline follows what
answers have taken so far, as TCP's retransmission timer does (RFC 6298), and each one that passes doubles the
next. Only for what may be repeated without harm: a deadline that was too short costs one look.
"""

from __future__ import annotations

SHORTEST_SECONDS, LONGEST_SECONDS = 0.1, 2.0
UNKNOWN_SECONDS = 0.3
"""The first deadline while nothing was measured."""

QUICK_BYTES_PER_SECOND = 10_000_000
SLOW_BYTES_PER_SECOND = 100_000
"""A message is given the time that it needs at the first speed, and at last at the second one. A link may be
slower than the first: a look is answered only once what was sent before it is through."""

_DOUBLINGS = 16


class Patience:
    """Deadlines for the answers of one stream's leader."""

    def __init__(self) -> None:
        self._mean = self._deviation = 0.0
        self._measured = False

    def seconds(self, passed: int = 0, size_bytes: int = 0) -> float:
        """For the answer to a message of that size, after so many deadlines that have *passed*."""
        first = UNKNOWN_SECONDS
        if self._measured:
            first = max(SHORTEST_SECONDS, self._mean + 4 * self._deviation)
        wanted = (first + size_bytes / QUICK_BYTES_PER_SECOND) * 2 ** min(passed, _DOUBLINGS)
        return min(wanted, longest_seconds(size_bytes))

    def took(self, seconds: float, size_bytes: int = 0) -> None:
        """The answer to a message of that size was there, or found, after so long."""
        sample = min(LONGEST_SECONDS, max(0.0, seconds - size_bytes / QUICK_BYTES_PER_SECOND))
        if not self._measured:
            self._mean, self._deviation, self._measured = sample, sample / 2, True
            return
        self._deviation += (abs(sample - self._mean) - self._deviation) / 4
        self._mean += (sample - self._mean) / 8


def longest_seconds(size_bytes: int) -> float:
    """The longest deadline that a message of that size is ever given."""
    return LONGEST_SECONDS + size_bytes / SLOW_BYTES_PER_SECOND
