"""Control groups: made, held, told from left-overs, killed as one. With the kernel's own, where it may be."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phalanx import cgroup_v2, system

pytestmark = pytest.mark.skipif(not cgroup_v2.base(), reason="this user may not make control groups here")


@pytest.fixture
def name() -> Iterator[str]:
    """A name that nobody else uses; what is in it ends with the test."""
    made = f"test-cgroup.{os.urandom(6).hex()}"
    yield made
    cgroup_v2.kill_and_remove(cgroup_v2.path_of(made))


def run_in(group: cgroup_v2.Cgroup, code: str) -> subprocess.Popen[bytes]:
    """Python code in *group* from before its first line on."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"input()\n{code}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    group.add(process.pid)
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    return process


ESCAPES = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        os.execve(sys.executable, ["x", "-c", "import time; time.sleep(60)"], {})
    os._exit(0)
time.sleep(60)
"""


def test_daemon_cannot_leave_it(name: str) -> None:
    """G1: neither a session of its own nor an empty environment nor the end of its parent gets it out."""
    group = cgroup_v2.create(name)
    process = run_in(group, ESCAPES)
    assert process.stdout is not None
    daemon = int(process.stdout.readline())
    assert {process.pid, daemon} <= set(cgroup_v2.pids(group.path))
    process.kill()
    process.wait()
    assert system.is_running(daemon)
    assert cgroup_v2.kill(group.path) == []
    assert not system.is_running(daemon)
    group.remove()
    process.stdout.close()
    assert not os.path.exists(group.path)


def test_nobody_forks_away(name: str) -> None:
    """A program that does nothing but fork is gone after one kill."""
    group = cgroup_v2.create(name)
    process = run_in(group, "import os, time\nwhile True:\n    if os.fork(): time.sleep(0.001)")
    time.sleep(0.3)
    assert cgroup_v2.kill(group.path) == []
    assert cgroup_v2.pids(group.path) == []
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    group.remove()


def test_without_cgroup_kill(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels before 5.14 have no such file: one after the other, until nobody is left."""
    real = cgroup_v2._write

    def write(path: str, text: str) -> None:
        if path.endswith("/cgroup.kill"):
            raise FileNotFoundError(2, "no such file", path)
        real(path, text)

    monkeypatch.setattr(cgroup_v2, "_write", write)
    group = cgroup_v2.create(name)
    process = run_in(group, "import subprocess\nsubprocess.run(['sleep', '60'])")
    while len(cgroup_v2.pids(group.path)) < 2:
        time.sleep(0.01)
    assert cgroup_v2.kill(group.path) == []
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    group.remove()


def test_groups_below_are_killed_and_removed_too(name: str) -> None:
    """A program may have made some of its own."""
    group = cgroup_v2.create(name)
    inner = Path(group.path, "inner", "most")
    inner.mkdir(parents=True)
    process = subprocess.Popen(["sleep", "60"])
    (inner / "cgroup.procs").write_text(str(process.pid))
    assert cgroup_v2.pids(group.path) == [process.pid]
    assert cgroup_v2.kill_and_remove(group.path) == []
    assert process.wait() == -9
    assert not os.path.exists(group.path)
    group.remove()
    group.remove()


def test_left_over_is_what_nobody_holds(name: str) -> None:
    """As long as its maker lives it is nobody else's; the kernel tells of the maker's end."""
    prefix = name.partition(".")[0] + "." + name.partition(".")[2]
    group = cgroup_v2.create(name)
    assert list(cgroup_v2.left_over(prefix)) == []
    code = f"from phalanx import cgroup_v2; cgroup_v2.create({name + '.dead'!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    (dead,) = cgroup_v2.left_over(prefix)
    assert dead.path == group.path + ".dead"
    assert list(cgroup_v2.left_over(prefix)) == [], "we hold it now"
    dead.remove()
    group.remove()


@pytest.mark.parametrize("before", ["open", "lock"])
def test_one_that_is_removed_while_it_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Somebody takes it for a left-over before it is held: it is made again."""
    open_, lock, calls = os.open, cgroup_v2.fcntl.flock, list[str]()

    def remove(moment: str) -> None:
        if moment == before and not calls:
            calls.append(moment)
            os.rmdir(cgroup_v2.path_of(name))

    def taken(path: str, *arguments: int) -> int:
        if str(path).endswith(name):
            remove("open")
        return open_(path, *arguments)

    def taken_before_the_lock(descriptor: int, operation: int) -> None:
        remove("lock")
        lock(descriptor, operation)

    monkeypatch.setattr(os, "open", taken)
    monkeypatch.setattr(cgroup_v2.fcntl, "flock", taken_before_the_lock)
    group = cgroup_v2.create(name)
    assert calls
    assert os.path.isdir(group.path)
    group.remove()


def test_none_but_ours_is_killed() -> None:
    """Whatever a damaged file says."""
    for path in ("/sys/fs/cgroup", "/sys/fs/cgroup/system.slice", f"{cgroup_v2.base()}/{cgroup_v2.OWN}", ""):
        with pytest.raises(ValueError, match="refusing"):
            cgroup_v2.kill(path)


def test_one_that_is_gone_is_empty() -> None:
    """Nothing to do, no error."""
    path = cgroup_v2.path_of("test-never-made")
    assert cgroup_v2.kill_and_remove(path) == []
    assert cgroup_v2.pids(path) == []
