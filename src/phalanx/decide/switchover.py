"""Whether a planned hand-over loses nothing, judged from what the active node knows and was told.

A graceful stand-down puts the rest of the database into the log, and the successor applies the log to its end
before it starts. So what has to hold is that both ends work, and that what is left is little.
"""

from __future__ import annotations

import msgspec

MAX_LAG_SECONDS = 2.0
"""How far the successor's replica may be behind the log: it is applied while the app stands still."""

MAX_SPOOL_BYTES = 64 * 1024 * 1024
"""How much may wait for the log on the active node: a graceful end ships for some seconds at most."""


class Ends(msgspec.Struct, frozen=True, kw_only=True):
    """Both ends of a hand-over. ``target``: the node that is to follow, empty: none is a candidate.

    Of an app with a database: the ``phase`` of it here and what is wrong with it (``problem``), how much
    waits for the log; ``target_role``: as ``phalanx db status`` shows it, empty if that node did not
    answer.
    """

    node: str
    target: str
    is_active: bool = True
    has_database: bool = False
    problem: str = ""
    phase: str = ""
    spool_bytes: int = 0
    target_role: str = ""
    target_reason: str = ""
    target_lag_seconds: float = 0.0
    target_lag_records: int = 0


class Obstacle(msgspec.Struct, frozen=True):
    """Why it is refused, and what to do. ``passes``: it is worth waiting some seconds."""

    problem: str
    remedy: str
    passes: bool = False


def obstacle(ends: Ends) -> Obstacle | None:
    """What speaks against handing over now; None: nothing."""
    if not ends.is_active:
        return Obstacle(f"{ends.node} is not active yet", "wait until it is: phalanx status", passes=True)
    if not ends.target:
        return Obstacle("no other node is an eligible candidate", "see why: phalanx why APP")
    return _of_database(ends) if ends.has_database else None


def _of_database(ends: Ends) -> Obstacle | None:
    look = "see: phalanx db status"
    if ends.phase != "live" or ends.problem:
        what = ends.problem or f"it is {ends.phase}"
        return Obstacle(f"the database on {ends.node} is not in order: {what}", look)
    if ends.spool_bytes > MAX_SPOOL_BYTES:
        waiting = f"{ends.spool_bytes >> 20} MiB of the database on {ends.node} wait for the log"
        return Obstacle(waiting, f"try again when that is less; {look}", passes=True)
    if not ends.target_role:
        return Obstacle(
            f"{ends.target} does not say how its replica is", f"choose another node; {look}", passes=True
        )
    if ends.target_role != "following":
        why = f": {ends.target_reason}" if ends.target_reason else ""
        return Obstacle(
            f"the replica on {ends.target} does not follow, it is {ends.target_role}{why}",
            f"choose another node; {look}",
            passes=ends.target_role in ("starting", "settling", "bootstrapping"),
        )
    if ends.target_lag_records and ends.target_lag_seconds > MAX_LAG_SECONDS:
        behind = f"{ends.target_lag_seconds:.1f} s ({ends.target_lag_records} records) behind"
        return Obstacle(
            f"the replica on {ends.target} is {behind}", f"try again when it is closer; {look}", passes=True
        )
    return None


__all__ = ["MAX_LAG_SECONDS", "MAX_SPOOL_BYTES", "Ends", "Obstacle", "obstacle"]
