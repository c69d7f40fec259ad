"""Judges a history: did any promise break, whatever was done to the processes?"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from phalanx.testing.history import Event, violations

WRITE_KEY = "write."
"""Keys of the test program's distinct writes: ``write.<epoch>.<number>``."""


class Waking(msgspec.Struct, frozen=True):
    """A host (node and keeper) was continued at ``at``. Until it has noticed, its section still shows life:
    nobody can stop code that was stopped (docs/guarantees.md). Its writes are refused all the same."""

    node: str
    at: float
    seconds: float = 0.5

    def excuses(self, event: Event) -> bool:
        """Whether *event* is such a sign of life."""
        return event.node == self.node and self.at <= event.at <= self.at + self.seconds


class Verdict(msgspec.Struct, frozen=True):
    """What the checker found. ``problems`` is empty when every promise was kept."""

    problems: tuple[str, ...]
    sections: int
    acknowledged: int
    refused: int
    excused: int


def judge(events: Sequence[Event], stored: Mapping[str, int], wakings: Iterable[Waking] = ()) -> Verdict:
    """Check G1 (no overlap), G2 (epochs grow, old ones write nothing), and acknowledged writes are there.

    *stored*: key → revision of every write that the server has at the end.
    """
    wakings = list(wakings)
    excused = [e for e in events if e.kind in ("tick", "passive") and any(w.excuses(e) for w in wakings)]
    drop = {id(event) for event in excused}
    problems = violations([event for event in events if id(event) not in drop])
    epochs = sorted({e.epoch for e in events if e.epoch and e.kind in ("active", "leader")})
    problems += _late_writes(stored, epochs)
    acknowledged = {str(e.data["key"]): int(e.data["revision"]) for e in events if e.kind == "written"}
    problems += _lost_writes(acknowledged, stored)
    refused = sum(1 for e in events if e.kind == "write-failed" and "Fenced" in str(e.data.get("error")))
    sections = sum(1 for e in events if e.kind == "active")
    return Verdict(tuple(problems), sections, len(acknowledged), refused, len(excused))


def _late_writes(stored: Mapping[str, int], epochs: Sequence[int]) -> list[str]:
    """An epoch is the revision of the leader key: no write of an earlier reign may lie behind it."""
    problems: list[str] = []
    for key, revision in stored.items():
        epoch = int(key.removeprefix(WRITE_KEY).split(".")[0])
        following = bisect_right(epochs, epoch)
        if following < len(epochs) and epochs[following] < revision:
            problems.append(
                f"G2: {key} of epoch {epoch} was stored at {revision}, after epoch {epochs[following]} began"
            )
        if revision <= epoch:
            problems.append(f"G2: {key} was stored at {revision}, before its own epoch {epoch}")
    return problems


def _lost_writes(acknowledged: Mapping[str, int], stored: Mapping[str, int]) -> list[str]:
    return [
        f"the acknowledged write {key} at revision {revision} is lost (found: {stored.get(key)})"
        for key, revision in acknowledged.items()
        if stored.get(key) != revision
    ]
