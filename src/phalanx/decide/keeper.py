"""When a node must stand down, when it must be killed: the rules of node and keeper about time.

The node asks :func:`phase` for itself; the keeper asks :class:`Watchdog` about its node. The keeper
acts later than the node should have, but early enough that its kills land before the session ends.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from phalanx.decide.timing import Timing

AWAY_SECONDS = 600.0
"""How long what was left running in a pause waits for its node's next life, before the keeper ends it."""


class Phase(StrEnum):
    """What a node may do with its active sections at a moment of its session."""

    WORK = "work"
    STAND_DOWN = "stand-down"
    """End every active section gracefully, now."""
    FENCE = "fence"
    """Kill whatever is still active, now."""
    OVER = "over"
    """Nothing may be active any more; this session is not used again."""


def phase(now: float, valid_until: float, timing: Timing) -> Phase:
    """The phase of a session that is valid until *valid_until*."""
    if now >= valid_until:
        return Phase.OVER
    if now >= timing.fence_at(valid_until):
        return Phase.FENCE
    if now >= timing.stand_down_at(valid_until):
        return Phase.STAND_DOWN
    return Phase.WORK


def next_phase_at(now: float, valid_until: float, timing: Timing) -> float:
    """The next moment at which :func:`phase` changes if no renewal comes; +inf once it is over."""
    moments = (timing.stand_down_at(valid_until), timing.fence_at(valid_until), valid_until)
    return min((moment for moment in moments if moment > now), default=float("inf"))


class Fencing(msgspec.Struct, frozen=True):
    """Kill what the node has registered, then end its session.

    ``kill_node``: the node itself too, in any case. Else only if code inside it is registered. ``keep``: what
    is to outlive the node in a pause is left running, and the session goes on without it.
    """

    reason: str
    kill_node: bool
    keep: bool = False


class Watchdog:
    """The keeper's judgement of its node. One life: after a fencing it is done."""

    def __init__(self, timing: Timing, now: float, away_seconds: float = AWAY_SECONDS) -> None:
        self.timing, self._away_seconds = timing, away_seconds
        self._last_beat = now
        self._gone: str | None = None
        self._away_since: float | None = None

    def on_away(self, now: float) -> None:
        """The node has ended in a pause; what runs on waits for its next life."""
        self._away_since, self._gone = now, None

    def on_back(self, now: float) -> None:
        """Its next life has come."""
        self._away_since, self._last_beat = None, now

    @property
    def is_away(self) -> bool:
        """Whether there is no node at present."""
        return self._away_since is not None

    def on_beat(self, now: float) -> None:
        """The node's event loop ran."""
        self._last_beat = now

    def on_gone(self, reason: str) -> None:
        """The node's end of the socket closed without a goodbye."""
        self._gone = reason

    def verdict(
        self, now: float, valid_until: float, *, has_resources: bool, keeps: bool = False
    ) -> Fencing | None:
        """What to do now. *has_resources*: the node has registered something that is still active. *keeps*:
        the node leads an app that is paused, so nothing of that ends with the node."""
        if self._away_since is not None:
            if now - self._away_since > self._away_seconds:
                return Fencing(f"no node has come back within {self._away_seconds:g} s", kill_node=False)
        elif self._gone is not None:
            return Fencing(self._gone, kill_node=True, keep=keeps)
        elif now - self._last_beat > self.timing.stall_limit:
            reason = f"the event loop stood still for more than {self.timing.stall_limit:g} s"
            return Fencing(reason, kill_node=True, keep=keeps)
        if has_resources and now >= self.kill_at(valid_until):
            # The node may be well, and only NATS away: programs can be killed without it.
            return Fencing("the session ran out before the active sections had ended", kill_node=False)
        return None

    def kill_at(self, valid_until: float) -> float:
        """When the keeper kills: half-way through the fence budget, which the node has to itself before."""
        return valid_until - self.timing.fence_budget / 2

    def next_check(self, valid_until: float) -> float:
        """The next moment at which :meth:`verdict` may change if nothing else happens."""
        if self._away_since is not None:
            return min(self._away_since + self._away_seconds, self.kill_at(valid_until))
        return min(self._last_beat + self.timing.stall_limit, self.kill_at(valid_until))
