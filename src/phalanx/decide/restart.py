"""Whether a program that has failed is started again in place, and when; or another node takes over.

What a node remembers of its restarts outlives its sections: a node whose restarts of the window are used up
hands over at the first failure when the app comes back to it. Together with the growing delay by which a node
steps aside after a failure (:class:`phalanx.decide.activation.Failures`) this bounds both rhythms for a
program that fails everywhere, however fast: in the long run one restart for each ``longest_delay``, and one
failover for each node and ``retry.longest``.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class RestartRule(msgspec.Struct, frozen=True):
    """What the user declares. ``count``: restarts within ``window`` before another node is better; 0: none
    ever. The first one comes after ``delay``, each further one after twice as long, at most
    ``longest_delay``. Seconds."""

    count: int = 2
    window: float = 600.0
    delay: float = 0.1
    longest_delay: float = 5.0

    def delay_after(self, restarts: int) -> float:
        """The delay of the next one after so many within the window."""
        return min(self.longest_delay, self.delay * 2.0 ** min(restarts, 60))


class RestartIn(msgspec.Struct, frozen=True):
    """Start it again here after ``delay`` seconds. ``beyond``: only because no other node could take over;
    ask again meanwhile, as one may return."""

    delay: float
    beyond: bool = False


class FailOver(msgspec.Struct, frozen=True):
    """Give it up here: another node takes over, and this one steps aside."""


Decision: TypeAlias = RestartIn | FailOver


class Restarts(msgspec.Struct, frozen=True):
    """The latest restarts in place of one app on one node, as moments of the caller's clock."""

    times: tuple[float, ...] = ()

    def recent(self, now: float, rule: RestartRule) -> int:
        """How many of them are within the window."""
        return sum(1 for moment in self.times if now - moment < rule.window)

    def decide(self, now: float, rule: RestartRule, *, others: bool) -> Decision:
        """What to do about a failure at *now*. *others*: another node is an eligible candidate."""
        if rule.count == 0:
            return FailOver()
        recent = self.recent(now, rule)
        if recent < rule.count:
            return RestartIn(rule.delay_after(recent))
        return FailOver() if others else RestartIn(rule.longest_delay, beyond=True)

    def restarted(self, now: float, rule: RestartRule) -> Restarts:
        """One more."""
        return Restarts((*self.times, now)[-rule.count :] if rule.count else ())
