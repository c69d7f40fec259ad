"""What a benchmark is, what its runs gave, and how that is shown."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec


class Peer(msgspec.Struct, frozen=True):
    """Somebody else's figure in the benchmark's unit. ``given``: from elsewhere, not measured here."""

    name: str
    value: float
    given: bool = True


class Run:
    """One run of a benchmark while it happens: how often to measure, and what came of it so far."""

    def __init__(self, name: str, runs: int) -> None:
        self.name, self.runs = name, runs
        self.values: list[float] = []
        self.peer: Peer | None = None
        self.problems: list[str] = []
        """What is wrong beyond the figures; with any, the bar counts as missed."""

    def add(self, value: float, text: str = "") -> None:
        """One measurement, in the benchmark's unit."""
        self.values.append(value)
        self.say(f"{len(self.values)}/{self.runs}: {text or number(value)}")

    def say(self, text: str) -> None:
        """Progress, for people, to standard error."""
        print(f"[{self.name}] {text}", file=sys.stderr, flush=True)


class Benchmark(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table. ``bar`` is for the median, for the 95th percentile, or for the ratio of the
    median to the peer (``bar_of``); the other bars have to be met besides."""

    name: str
    work: str
    unit: str
    bar: float
    measure: Callable[[Run], Awaitable[None]]
    runs: int
    fixed: bool = False
    """Whether --runs means nothing here."""
    bar_of: Literal["median", "p95", "ratio"] = "median"
    p95_bar: float | None = None
    max_bar: float | None = None
    ratio_bar: float | None = None
    peer: Peer | None = None


class Figures(msgspec.Struct, frozen=True):
    """What ``--json`` prints. ``ratio`` is median / peer; null where there is nothing to compare."""

    name: str
    unit: str
    n: int
    min: float | None
    median: float | None
    p95: float | None
    max: float | None
    bar: float
    peer: float | None
    ratio: float | None
    met: bool


def figures(benchmark: Benchmark, run: Run) -> Figures:
    """The figures of a run that has ended; without any value the bar is missed."""
    values, peer = sorted(run.values), run.peer or benchmark.peer
    if not values:
        nothing = (None, None, None, None)
        return Figures(benchmark.name, benchmark.unit, 0, *nothing, benchmark.bar, None, None, False)
    median, p95, most = statistics.median(values), percentile(values, 95), values[-1]
    ratio = median / peer.value if peer is not None and peer.value else None
    held = {"median": median, "p95": p95, "ratio": ratio}[benchmark.bar_of]
    bars = (
        (held, benchmark.bar),
        (p95, benchmark.p95_bar),
        (most, benchmark.max_bar),
        (ratio, benchmark.ratio_bar),
    )
    met = not run.problems and all(bar is None or (value is not None and value <= bar) for value, bar in bars)
    return Figures(
        benchmark.name,
        benchmark.unit,
        len(values),
        _rounded(values[0]),
        _rounded(median),
        _rounded(p95),
        _rounded(most),
        benchmark.bar,
        _rounded(peer.value) if peer is not None else None,
        _rounded(ratio) if ratio is not None else None,
        met,
    )


def percentile(ordered: list[float], percent: float) -> float:
    """The smallest of the *ordered* values that at least *percent* of them do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def number(value: float | None) -> str:
    """A figure for people."""
    return "-" if value is None else f"{value:.4g}"


def bar_text(benchmark: Benchmark) -> str:
    """The bar for people."""
    of, unit = ("p95 " if benchmark.bar_of == "p95" else ""), ("x" if benchmark.bar_of == "ratio" else "")
    text = f"{of}<= {number(benchmark.bar)}{unit}"
    for name, bar, sign in (
        ("p95 ", benchmark.p95_bar, ""),
        ("max ", benchmark.max_bar, ""),
        ("", benchmark.ratio_bar, "x"),
    ):
        text += f", {name}<= {number(bar)}{sign}" if bar is not None else ""
    return text


def peer_text(benchmark: Benchmark, run: Run) -> str:
    """The peer for people; a figure that was not measured here says so."""
    peer = run.peer or benchmark.peer
    return f"{peer.name} {number(peer.value)}{' (given)' if peer.given else ''}" if peer is not None else "-"


HEADER = ("name", "unit", "n", "min", "median", "p95", "max", "bar", "ratio", "met", "peer")


def row(benchmark: Benchmark, run: Run, result: Figures) -> tuple[str, ...]:
    """One line of the table for people."""
    return (
        result.name,
        result.unit,
        str(result.n),
        *(number(value) for value in (result.min, result.median, result.p95, result.max)),
        bar_text(benchmark),
        number(result.ratio),
        "yes" if result.met else "NO",
        peer_text(benchmark, run),
    )


WIDTHS = (22, 8, 6, 9, 9, 9, 9, 25, 8, 4, 0)


def line(cells: tuple[str, ...]) -> str:
    """The cells beside each other."""
    return " ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()
