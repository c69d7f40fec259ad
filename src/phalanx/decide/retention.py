"""Which snapshots of a database may go, and up to where its log. Pure: times are the caller's.

Three things hold for every plan:

* The newest snapshot stays, however old it is and whatever the limits say.
* The log keeps everything after the oldest snapshot that stays: each of them can be brought to any later
  position.
* Nothing goes at once. A snapshot, or a part of the log, goes only when a snapshot after it has been there
  for ``grace_seconds``. So whoever has begun to read a snapshot can finish, finds the log that
  goes on from it, and a standby that is a moment behind a new snapshot still finds its next record.

The last one is also why a plan does not swing: between two snapshots it only ever grows with time.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

GRACE_SECONDS = 900.0


class Kept(msgspec.Struct, frozen=True):
    """A snapshot that is there: its place in the log, and when it was finished (Unix seconds)."""

    name: str
    sequence: int
    created: float


class Limits(msgspec.Struct, frozen=True):
    """``count`` snapshots at most, at least 1, none of them older than ``age_seconds``."""

    count: int
    age_seconds: float
    grace_seconds: float = GRACE_SECONDS


class Plan(msgspec.Struct, frozen=True):
    """Names of snapshots to delete, oldest first; then the log may be purged up to and with ``purge``.

    0: nothing of the log may go.
    """

    delete: tuple[str, ...] = ()
    purge: int = 0


def plan(snapshots: Sequence[Kept], limits: Limits, now: float) -> Plan:
    """What may go at *now*. Of several at one place in the log the one finished last counts as the newest."""
    ordered = sorted(snapshots, key=lambda one: (one.sequence, one.created))
    settled = [n for n, one in enumerate(ordered) if one.created <= now - limits.grace_seconds]
    if not settled:
        return Plan()
    doomed: list[Kept] = []
    for place, one in enumerate(ordered[: settled[-1]]):
        too_many = len(ordered) - place > max(1, limits.count)
        if too_many or one.created < now - limits.age_seconds:
            doomed.append(one)
    oldest = next(one for one in ordered if one not in doomed)
    return Plan(tuple(one.name for one in doomed), oldest.sequence)
