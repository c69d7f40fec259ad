"""How the command line prints: for people, or as JSON.

JSON goes to standard output, one document or, for streams, one object a line. Errors are one line on
standard error in both. Colours and boxes are for terminals only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Never

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 1000
"""Lines that go into a file or a pipe are not wrapped."""


class _Console(Console):
    def on_broken_pipe(self) -> Never:
        """Not rich's business: ``main`` ends all commands alike."""
        raise BrokenPipeError


def _console() -> Console:
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return _Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def emit(value: object, *, pretty: bool = False) -> None:
    """Print *value* as JSON: one line, or *pretty* with indentation."""
    data = msgspec.json.encode(value)
    print((msgspec.json.format(data, indent=2) if pretty else data).decode(), flush=True)


def say(*parts: str | tuple[str, str]) -> None:
    """Print one line; a part may be (text, style)."""
    line = Text()
    for part in parts:
        text, style = part if isinstance(part, tuple) else (part, "")
        line.append(clean(text), style)
    _console().print(line)
    sys.stdout.flush()


def table(heads: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]]) -> None:
    """Print columns; a cell may be (text, style)."""
    console = _console()
    box = SIMPLE_HEAD if console.is_terminal else None
    made = Table(box=box, pad_edge=False, header_style="bold", show_edge=False)
    for head in heads:
        made.add_column(head, overflow="fold")
    for row in rows:
        made.add_row(*(_cell(cell) for cell in row))
    if console.is_terminal:
        console.print(made)
        return
    with console.capture() as capture:
        console.print(made)
    for line in capture.get().splitlines():  # rich fills the columns with spaces
        print(line.rstrip())
    sys.stdout.flush()


def _cell(cell: str | tuple[str, str]) -> Text:
    text, style = cell if isinstance(cell, tuple) else (cell, "")
    return Text(clean(text), style)


def clear_screen() -> None:
    """Start at the top again, on a terminal."""
    if sys.stdout.isatty():
        _console().clear()


def error(message: object) -> None:
    """One line on standard error."""
    print(f"error: {clean(str(message))}", file=sys.stderr, flush=True)


def note(message: str) -> None:
    """One line for people, on standard error, so that it does not get between JSON."""
    print(clean(message), file=sys.stderr, flush=True)


def clean(text: str) -> str:
    """One line without control characters: names and reasons come from elsewhere."""
    return "".join(c if c.isprintable() else " " for c in text)


def clock(unix_seconds: float) -> str:
    """A moment in local time, to the millisecond."""
    if not unix_seconds:
        return "-"
    return datetime.fromtimestamp(unix_seconds).astimezone().isoformat(" ", "milliseconds")


def span(seconds: float) -> str:
    """A duration for people: ``12 ms``, ``3.4 s``, ``5 min``, ``2 h``, ``3 d``."""
    seconds = max(0.0, seconds)
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    for unit, length, limit in (("min", 60, 3600), ("h", 3600, 48 * 3600), ("d", 86400, float("inf"))):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    raise AssertionError("unreachable")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def plain(value: Any) -> Any:
    """*value* as what JSON knows, with all fields of structs."""
    return msgspec.to_builtins(value)
