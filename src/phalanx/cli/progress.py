"""Bars for what takes long: on standard error, and only where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

Report = Callable[[int, int], None]
"""``report(done_bytes, total_bytes)``; a total of 0 is not known (yet)."""


@contextlib.contextmanager
def bar(what: str, *, shown: bool = True) -> Generator[Report]:
    """A bar for bytes that go away when it ends. Without *shown*, or without a terminal, there is none."""
    if not shown or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total or None)

        yield report
