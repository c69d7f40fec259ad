"""The durations that safety rests on, and how they hang together.

::

    last renewal that a majority acknowledged, counted from when it was SENT
    |
    |-------------------- hold = 0.95 x ttl -----------------------|   the session is valid
    |                          |------ grace ------|---- fence ----|
    0                     stand down           kill what is      over: never
                          gracefully           still there       renewed again
    |
    |--------------------- observe = 1.05 x ttl --------------------------|   others may end it

Both factors together bear clocks that each run up to 5 % fast or slow: the holder stops after at
most 0.95 x ttl / 0.95 = ttl of true time, and no observer ends a session before
1.05 x ttl / 1.05 = ttl of true time after it received a renewal, which is after it was sent.
"""

from __future__ import annotations

import msgspec

HOLD_FACTOR = 0.95
OBSERVE_FACTOR = 1.05


class Timing(msgspec.Struct, frozen=True):
    """Validated durations in seconds. Build it with :meth:`of`, which fills in the proportions."""

    ttl: float = 5.0
    renew_every: float = 0.5
    fence_budget: float = 1.0
    grace: float = 1.5
    stall_limit: float = 2.0

    @classmethod
    def of(
        cls,
        ttl: float = 5.0,
        *,
        renew_every: float | None = None,
        fence_budget: float | None = None,
        grace: float | None = None,
        stall_limit: float | None = None,
    ) -> Timing:
        """Timing for a TTL: renewal every ttl/10, fence budget ttl/5 up to 1 s, grace 0.3 x ttl."""
        return cls(
            ttl=ttl,
            renew_every=renew_every if renew_every is not None else ttl / 10,
            fence_budget=fence_budget if fence_budget is not None else min(1.0, ttl / 5),
            grace=grace if grace is not None else 0.3 * ttl,
            stall_limit=stall_limit if stall_limit is not None else 2.0,
        )

    @property
    def hold(self) -> float:
        """How long a renewal keeps the session valid for its holder."""
        return self.ttl * HOLD_FACTOR

    @property
    def observe(self) -> float:
        """How long an observer must have heard no renewal before it may end a session."""
        return self.ttl * OBSERVE_FACTOR

    @property
    def gap(self) -> float:
        """A session stream silent for longer than this counts as interrupted for an observer."""
        return max(3 * self.renew_every, 0.3 * self.ttl)

    def fence_at(self, valid_until: float) -> float:
        """When what is still active must be killed."""
        return valid_until - self.fence_budget

    def stand_down_at(self, valid_until: float) -> float:
        """When active sections must begin to end gracefully."""
        return valid_until - self.fence_budget - self.grace
