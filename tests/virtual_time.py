"""Virtual time for simulators: the moments of one schedule, its random choices, its trace."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any, ClassVar


class Violation(Exception):
    """A promise was broken. ``promise`` is G1 … or the name of an invariant."""

    def __init__(self, promise: str, text: str, at: float) -> None:
        super().__init__(f"{promise} at {at:.4f} s: {text}")
        self.promise, self.text, self.at = promise, text, at


class VirtualTime:
    """The clock of one schedule, which its seed determines: no wait takes any time, nothing is concurrent."""

    NAME_WIDTH: ClassVar[int] = 10
    """Of the column of the trace that tells who did it."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.seed, self.rng = seed, Random(seed)
        self.now = 0.0
        self.lines: list[str] | None = [] if tracing else None
        self.counts: dict[str, int] = {}
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._number = 0

    # --- time

    def at(self, when: float, call: Callable[..., object], *args: Any) -> None:
        """Call at that moment of true time; in the order of the requests where moments are equal."""
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, call, args))

    def after(self, delay: float, call: Callable[..., object], *args: Any) -> None:
        """Call that much later."""
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay, self._number, call, args))

    def run(self, until: float, stop: Callable[[], bool] | None = None) -> bool:
        """Advance; True when *stop* said so before *until*."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, _, call, args = pop(heap)
            call(*args)
            if stop is not None and stop():
                return True
        self.now = until
        return False

    # --- the record

    def log(self, who: str, text: str) -> None:
        """One line of the trace."""
        if self.lines is not None:
            self.lines.append(f"{self.now:9.4f}  {who:<{self.NAME_WIDTH}} {text}")

    def count(self, what: str) -> None:
        """Coverage: this happened."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def fail(self, promise: str, text: str) -> None:
        """A promise is broken."""
        self.log("VIOLATION", f"{promise}: {text}")
        raise Violation(promise, text, self.now)
