"""Capture where the system refuses something: notices of changes (inotify), the file itself.

What refuses is the kernel: each part runs in a process of its own, root of a user namespace (where the limits
of inotify can be set) that has given up root's right to read everything.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_capture import Bench
from tests.waiting import until

from phalanx.data import capture as capture_module

ROOT = Path(__file__).parents[2]
LIMITS = Path("/proc/sys/user")
BEFORE = ("unshare", "--user", "--map-root-user", "setpriv", "--bounding-set=-dac_override,-dac_read_search")


def _can_refuse() -> bool:
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*BEFORE, "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not _can_refuse(), reason="needs user namespaces")


async def commits_are_noticed(bench: Bench) -> None:
    """Each one at once, not by the look that takes place anyhow."""
    capture = bench.captures[-1]
    db = bench.connect()
    await until(lambda: capture.is_running, 10)
    for number in range(3):
        before = capture.captured
        db.execute("INSERT INTO t (x) VALUES (?)", (bytes(500 + number),))
        await until(lambda before=before: capture.captured > before, 20)
    assert not capture.failed.done()
    assert capture.trouble == ""


async def no_more_watches(bench: Bench) -> None:
    """The limit is reached between the start of the capture and the program's first commit."""
    capture = bench.capture()
    await capture.start()
    (LIMITS / "max_inotify_watches").write_text("0")
    await commits_are_noticed(bench)


async def no_instance(bench: Bench) -> None:
    """There is none left for us when the capture starts."""
    (LIMITS / "max_inotify_instances").write_text("0")
    capture = bench.capture()
    await capture.start()
    await commits_are_noticed(bench)


async def unreadable(bench: Bench) -> None:
    """The program makes its file under another user, for itself alone; then somebody gives us the right."""
    made = bench.live.with_name("made.db")
    with sqlite3.connect(made) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t (i INTEGER PRIMARY KEY, x BLOB)")
    db.close()
    made.chmod(0)
    capture = bench.capture()
    await capture.start()
    made.rename(bench.live)
    await until(lambda: "failing" in bench.kinds(), 10)
    assert bench.kinds() == ["failing"]
    detail = bench.events[0][1]
    assert str(bench.live) in detail
    assert "give the node's user the right to read and write the file" in detail
    await until(lambda: capture.trouble.endswith(detail), 10)
    assert not capture.failed.done()
    bench.live.chmod(0o600)
    await commits_are_noticed(bench)


PARTS: dict[str, Callable[[Bench], Coroutine[Any, Any, None]]] = {
    part.__name__: part for part in (no_more_watches, no_instance, unreadable)
}


async def _main(part: str, folder: Path) -> None:
    logging.basicConfig(level=logging.INFO)
    capture_module.LOOK_SECONDS = 60.0  # in this process alone
    bench = Bench(folder)
    try:
        await PARTS[part](bench)
    finally:
        for one in bench.captures:
            await bench.stop(one, 0.0)
        bench.close()


@pytest.mark.parametrize("part", PARTS)
def test_what_is_refused_does_not_end_the_capture(part: str, tmp_path: Path) -> None:
    """It is said once, with what to do, and every commit is captured as soon as that is possible."""
    command = [*BEFORE, sys.executable, "-m", __name__, part, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("inotify is refused") == 1, done.stderr


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], Path(sys.argv[2])))
