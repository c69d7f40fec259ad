"""``python -m tests.run_all [--coverage] [arguments of pytest]``: all tests, as ``make test`` runs them.

Most tests wait, for processes to start and for TTLs to pass. So several pytest processes run them side by
side, one more than there are cores ($PHALANX_TEST_JOBS: so many), each in files of its own
(``tests/sharing.py``). Then those marked ``alone`` run, which measure time.

What each process prints is shown line by line, with its name before it. The last line adds it all up as
pytest's own would. It is a success only if every test that was collected has come to its end, once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.sharing import ALONE, FOLDER_VARIABLE, NAME_VARIABLE

JOBS = int(os.environ.get("PHALANX_TEST_JOBS", "0")) or (os.cpu_count() or 1) + 1
NO_TESTS = 5
"""pytest's exit code when there was nothing to run, which is no failure of one among several."""
KINDS = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "warnings", "error")


class Process:
    """One pytest process."""

    def __init__(self, name: str, folder: Path, command: Sequence[str]) -> None:
        self.name, self._folder = name, folder
        self._process = subprocess.Popen(
            command,
            env={**os.environ, FOLDER_VARIABLE: str(folder), NAME_VARIABLE: name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            sys.stdout.write(f"{self.name}| {line}")
            sys.stdout.flush()

    def wait(self) -> int:
        """Its exit code, once all that it has printed is shown."""
        code = self._process.wait()
        self._reader.join(10)  # what it has left behind may hold its output open
        return code

    def found(self) -> dict[str, Any]:
        """What came of its tests; nothing if it did not live to tell."""
        path = self._folder / f"found-{self.name}"
        return json.loads(path.read_text()) if path.exists() else {}


def run(names: Sequence[str], folder: Path, command: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """Run one process of each name side by side: what went wrong, and how many tests were what."""
    processes = [Process(name, folder, command) for name in names]
    codes = {process.name: process.wait() for process in processes}
    wrong = [f"pytest {name} ended with {code}" for name, code in codes.items() if code not in (0, NO_TESTS)]
    counts: Counter[str] = Counter()
    collected: set[str] = set()
    ended: Counter[str] = Counter()
    for process in processes:
        if not (found := process.found()):
            wrong.append(f"pytest {process.name} did not come to its end")
        counts.update({kind: found.get("counts", {}).get(kind, 0) for kind in KINDS if kind != "deselected"})
        collected.update(found.get("collected", ()))
        ended.update(found.get("ended", ()))
        wrong += [f"FAILED {one}" for one in found.get("failed", ())]
    wrong += [f"NOT RUN {one}" for one in sorted(collected - set(ended))]
    wrong += [f"RUN {times} TIMES {one}" for one, times in ended.items() if times > 1]
    return wrong, counts


def main(arguments: Sequence[str]) -> int:
    """Run all: the exit code."""
    began = time.monotonic()
    python = [sys.executable, "-u", "-m"]
    if "--coverage" in arguments:
        python += ["coverage", "run", "--parallel-mode", "-m"]
    options = [
        "-p",
        "tests.sharing",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "-o",
        "console_output_style=classic",
    ]
    command = [*python, "pytest", *options, *(one for one in arguments if one != "--coverage")]
    wrong, counts = list[str](), Counter[str]()
    for names in ([str(number) for number in range(1, JOBS + 1)], [ALONE]):
        with tempfile.TemporaryDirectory(prefix="phalanx-sharing-") as folder:
            of_these, how_many = run(names, Path(folder), command)
        wrong += of_these
        counts += how_many
    print("\n".join(("", *wrong)))
    told = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) or "no tests ran"
    if wrong and not counts["failed"] + counts["error"]:
        told = f"error, {told}"
    print(f" {told} in {time.monotonic() - began:.2f}s ".center(80, "="), flush=True)
    return 1 if wrong or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
