"""How long to wait before the next try, growing with failures in a row."""

from __future__ import annotations

import msgspec


class Backoff(msgspec.Struct, frozen=True):
    """Exponential delay: ``first x factor^(failures-1)``, at most ``longest``. Seconds."""

    first: float = 0.5
    factor: float = 2.0
    longest: float = 60.0

    def delay(self, failures: int) -> float:
        """The delay after that many failures in a row (0 after none)."""
        if failures <= 0:
            return 0.0
        return min(self.longest, self.first * self.factor ** min(failures - 1, 60))
