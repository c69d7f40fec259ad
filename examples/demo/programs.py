"""Looks at the machine's processes all the time: which backends run, of which node, under which epoch.

It asks the kernel, not Phalanx: what it finds is evidence for or against the promise that no two run at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from examples.demo.node import RUN_MARK
from phalanx import system

_LOOK_MS = 5
_YOUNG_SECONDS = 0.5
"""A process shows its parent's environment between fork and exec: young ones are looked at again."""


def waited_for_cpu() -> float:
    """Seconds since the start of the machine in which some process waited for a CPU; 0 where not known."""
    try:
        return int(Path("/proc/pressure/cpu").read_text().split("total=")[1].split()[0]) / 1e6
    except (OSError, IndexError, ValueError):
        return 0.0


class Program(msgspec.Struct):
    """One backend process. ``seen`` and ``ended`` are ``system.now()``; ``ended`` is None while it runs."""

    pid: int
    node: str
    epoch: int
    seen: float
    ended: float | None = None


class Overlap(msgspec.Struct, frozen=True):
    """Two backends of different epochs that were seen running in the same moment."""

    at: float
    first: Program
    second: Program

    def __str__(self) -> str:
        one, two = self.first, self.second
        return (
            f"the programs of {one.node} (epoch {one.epoch}) and {two.node} (epoch {two.epoch}) ran at once"
        )


class Programs:
    """Watches the backends of the demo run *run* from a thread of its own, from ``with`` to its end."""

    def __init__(self, run: str) -> None:
        self._mark = f"{RUN_MARK}={run}".encode()
        self.all: list[Program] = []
        self.overlaps: list[Overlap] = []
        self._known: dict[int, float] = {}
        self._running: dict[int, Program] = {}
        """By pidfd, which becomes readable when the process ends."""
        self._poll = select.poll()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="programs", daemon=True)

    def running(self) -> list[Program]:
        """Those that run."""
        return [program for program in list(self.all) if program.ended is None]

    def of_epoch_after(self, epoch: int) -> Program | None:
        """The first one that was started under a later epoch."""
        return next((program for program in list(self.all) if program.epoch > epoch), None)

    def last_of(self, epoch: int) -> Program | None:
        """The last one that was started under that epoch."""
        return next((program for program in reversed(list(self.all)) if program.epoch == epoch), None)

    def kill_left(self) -> None:
        """SIGKILL all that run: after the end of the hosts there are none, unless a keeper failed."""
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            if self._identify(pid, 0.0) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._note_ends(_LOOK_MS)
            self._look()

    def _note_ends(self, timeout_ms: int) -> None:
        if not self._running:
            self._stop.wait(timeout_ms / 1000)
            return
        for descriptor, _ in self._poll.poll(timeout_ms):
            self._running.pop(descriptor).ended = system.now()
            self._poll.unregister(descriptor)
            os.close(descriptor)

    def _look(self) -> None:
        now = system.now()
        listed = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._known = {pid: first for pid, first in self._known.items() if pid in listed}
        for pid in listed:
            if now - self._known.setdefault(pid, now) < _YOUNG_SECONDS:
                self._examine(pid, now)

    def _examine(self, pid: int, now: float) -> None:
        if any(program.pid == pid for program in self._running.values()):
            return
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return
        found = self._identify(pid, now)
        if found is None:
            os.close(descriptor)
            return
        # Who has ended by now does not overlap with the one that was just seen.
        self._note_ends(0)
        others = [program for program in self._running.values() if program.epoch != found.epoch]
        self.overlaps += [Overlap(now, other, found) for other in others]
        self._running[descriptor] = found
        self._poll.register(descriptor, select.POLLIN)
        self.all.append(found)

    def _identify(self, pid: int, now: float) -> Program | None:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return None
        if self._mark not in environment:
            return None
        pairs = (entry.decode(errors="replace").partition("=") for entry in environment)
        values = {name: value for name, _, value in pairs}
        epoch = values.get("PHALANX_EPOCH", "")
        return Program(pid, values.get("PHALANX_NODE", ""), int(epoch), now) if epoch.isdigit() else None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(5)
        for descriptor in self._running:
            os.close(descriptor)
