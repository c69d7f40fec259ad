"""What people see: a line for each event, with the time since the start; or JSON, one object a line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from examples.demo import tables
from examples.demo.promises import FAULTS, Outcome, fault
from phalanx import system

_SILENCE_SECONDS = 2.5
_PLAIN_WIDTH = 160
"""Where nobody says how wide the output is."""
_STYLES = {"demo": "bold", "client": "cyan", "error": "red", "kept": "bold green", "broken": "bold red"}


class Timeline:
    """Prints to standard output. ``as_json``: for machines."""

    def __init__(self, *, as_json: bool = False) -> None:
        self._json = as_json
        self._console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
        self._began, self._began_wall = system.now(), system.wall()
        self._printed = self._began
        self._status: Status | None = None
        if not as_json and self._console.is_terminal:
            self._status = self._console.status("")

    @property
    def is_json(self) -> bool:
        """Whether it prints for machines."""
        return self._json

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return system.now() - self._began

    def say(
        self, who: str, text: str, *, style: str = "", at: float | None = None, wall: float | None = None
    ) -> None:
        """One event. *at*: ``system.now()`` of it, or *wall*: Unix time; by default now."""
        seconds = self.elapsed
        if at is not None:
            seconds = at - self._began
        elif wall is not None:
            seconds = wall - self._began_wall
        self._printed = system.now()
        if self._json:
            self._put({"t": round(seconds, 3), "who": who, "what": text})
            return
        shade = style or _STYLES.get(who, "dim")
        self._console.print(f"[dim]{seconds:7.3f}[/]  {who:<10} [{shade}]{escape(text)}[/]")

    def title(self, text: str) -> None:
        """The beginning of a part."""
        self._printed = system.now()
        if self._json:
            self._put({"t": round(self.elapsed, 3), "who": "demo", "what": text})
            return
        self._console.print()
        self._console.rule(f"[bold]{escape(text)}[/]", align="left", style="dim")

    def progress(self, text: str) -> None:
        """What is being waited for. Shown at once on a terminal, elsewhere when it takes long."""
        if self._status is not None:
            self._status.start()
            self._status.update(f"{self.elapsed:5.1f} s  {escape(text)}")
        elif system.now() - self._printed > _SILENCE_SECONDS:
            self.say("…", text)

    def outcome(self, outcome: Outcome) -> None:
        """The end of a fault."""
        if self._json:
            self._put({"t": round(self.elapsed, 3), **msgspec.to_builtins(outcome), "kept": outcome.is_kept})
            return
        for problem in outcome.broken:
            self.say("BROKEN", problem, style=_STYLES["broken"])
        if outcome.is_kept:
            self.say("kept", fault(outcome.fault).promise, style=_STYLES["kept"])

    def summary(self, outcomes: Sequence[Outcome], problems: Sequence[str], requests: int) -> None:
        """The end of all."""
        self.close()
        kept = not problems and all(outcome.is_kept for outcome in outcomes)
        if self._json:
            self._put({"kept": kept, "seconds": round(self.elapsed, 2), "problems": list(problems)})
            return
        for table, legend in tables.of(outcomes):
            self._console.print()
            self._console.print(table)
            self._console.print(f"[dim]{legend}[/]")
        for problem in problems:
            self._console.print(f"[bold red]BROKEN[/]  {escape(problem)}")
        faults = f"{len(outcomes)} of {len(FAULTS)} faults, {requests:,} requests, {self.elapsed:.1f} s"
        verdict = "[bold green]Every promise was kept.[/]" if kept else "[bold red]A promise was broken.[/]"
        self._console.print(f"{verdict}  [dim]{faults}[/]")

    def close(self) -> None:
        """Nothing is being waited for any more."""
        if self._status is not None:
            self._status.stop()

    def _put(self, item: object) -> None:
        sys.stdout.write(msgspec.json.encode(item).decode() + "\n")
        sys.stdout.flush()
