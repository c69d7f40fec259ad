"""What happened on several nodes, in one file, and the checks that no two sections overlapped.

Every process appends JSON lines with one write each (O_APPEND), stamped with the clock that all
processes of a machine share, so that the order of events of different nodes can be compared.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from phalanx import system


class Event(msgspec.Struct, frozen=True):
    """One event. ``at`` is ``system.now()`` of the machine, in seconds."""

    at: float
    kind: str
    node: str = ""
    app: str = ""
    epoch: int = 0
    data: dict[str, Any] = {}


class Interval(msgspec.Struct, frozen=True):
    """One active section as it was seen: from its first to its last sign of life."""

    app: str
    node: str
    epoch: int
    begin: float
    end: float


class History:
    """The file. ``record`` may be called from any process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def record(self, kind: str, node: str = "", app: str = "", epoch: int = 0, **data: Any) -> None:
        """Append one event, stamped now."""
        event = Event(system.now(), kind, node, app, epoch, data)
        os.write(self._file, msgspec.json.encode(event) + b"\n")

    def events(self, *kinds: str, since: float = 0.0) -> list[Event]:
        """The events so far (of those *kinds*, after *since*), in order of time."""
        found: list[Event] = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                event = msgspec.json.decode(line, type=Event)
            except (msgspec.DecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"a damaged line in {self.path}: {line!r}") from error
            if event.at >= since and (not kinds or event.kind in kinds):
                found.append(event)
        return sorted(found, key=lambda event: event.at)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Follower:
    """Reads a history while it grows: every event once. Cheap enough to be asked often."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._rest = b""

    def read(self) -> list[Event]:
        """The events since the last call, in the order in which they were written (nearly that of time)."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [msgspec.json.decode(line, type=Event) for line in lines]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def sections(events: list[Event]) -> list[Interval]:
    """The active sections, from ``active``, ``tick`` and ``passive`` events, by their beginnings."""
    spans: dict[tuple[str, str, int], list[float]] = {}
    for event in events:
        if event.kind in ("active", "tick", "passive"):
            spans.setdefault((event.app, event.node, event.epoch), []).append(event.at)
    found = [Interval(app, node, epoch, min(at), max(at)) for (app, node, epoch), at in spans.items()]
    return sorted(found, key=lambda section: section.begin)


def violations(events: list[Event]) -> list[str]:
    """What contradicts G1 and G2: overlapping sections of one app, epochs that do not grow."""
    problems: list[str] = []
    latest: dict[str, Interval] = {}
    for section in sections(events):
        before = latest.get(section.app)
        if before is not None:
            if section.begin < before.end:
                early_ms = 1000 * (before.end - section.begin)
                problems.append(
                    f"app {section.app}: {section.node} (epoch {section.epoch}) began {section.begin:.4f}, "
                    f"{early_ms:.1f} ms before {before.node} (epoch {before.epoch}) ended"
                )
            if section.epoch <= before.epoch:
                problems.append(
                    f"app {section.app}: epoch {section.epoch} of {section.node} after epoch {before.epoch}"
                )
        if before is None or section.end >= before.end:
            latest[section.app] = section
    return problems
