"""Killing all processes of a section, whatever they did to hide: real processes, no mocks."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phalanx import system

pytestmark = pytest.mark.skipif(not system.LINUX, reason="needs /proc")

SLEEPER = f"[{sys.executable!r}, '-c', 'import time; time.sleep(60)']"


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until *condition* holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come to be"
        time.sleep(0.005)


class Section:
    """Starts a section's program, and knows the pids that it writes down in ``file``."""

    def __init__(self, file: Path) -> None:
        self.marker, self.file = f"wiki.1.{secrets.token_hex(8)}", file
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, code: str, count: int = 1) -> system.ProcessRef:
        """Run Python *code* (``note(pid)`` writes a pid down) until it has noted *count*."""
        prelude = (
            "import os, subprocess, sys, threading, time\n"
            f"def note(pid): os.write(os.open({str(self.file)!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY), "
            "b'%d\\n' % pid)\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude + code],
            env={**os.environ, system.MARKER_ENV: self.marker},
            start_new_session=True,
        )
        until(lambda: len(self.noted()) >= count)
        return system.ProcessRef.of(self.process.pid)

    def noted(self) -> list[int]:
        """The pids so far."""
        return [int(pid) for pid in self.file.read_text().split()] if self.file.exists() else []

    def running(self) -> list[int]:
        """Which of them run."""
        return [pid for pid in self.noted() if system.is_running(pid)]

    def end(self) -> None:
        """Leave nothing."""
        if self.process is not None:
            system.kill_marked(self.marker, self.process.pid)
            self.process.wait(5)
        for pid in self.running():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def section(tmp_path: Path) -> Iterator[Section]:
    """A section of which nothing outlives the test."""
    made = Section(tmp_path / "pids")
    yield made
    made.end()


HIDDEN = f"note(subprocess.Popen({SLEEPER}, env={{}}, start_new_session=True).pid)\n"
"""Starts a child with a session and an environment of its own, as sudo does: only its parent tells of it."""


def test_g1_child_without_mark_in_its_own_session_is_killed(section: Section) -> None:
    """It is found through its parent, so the search comes before the first kill."""
    leader = section.start(HIDDEN + "time.sleep(60)")
    report = system.kill_marked(section.marker, leader.pid, start_time=leader.start_time)
    assert report.remaining == ()
    assert section.running() == []
    assert set(report.killed) == {leader.pid, *section.noted()}


def test_g1_child_of_a_thread_is_killed(section: Section) -> None:
    """Each thread has a list of children of its own; Java, Go and Python fork from any of them."""
    code = f"def run():\n    {HIDDEN}    time.sleep(60)\nthreading.Thread(target=run).start()\n"
    leader = section.start(code)
    assert set(system.find_marked(section.marker, leader.pid)) == {leader.pid, *section.noted()}
    assert system.kill_marked(section.marker, leader.pid).remaining == ()
    assert section.running() == []


def test_g1_whole_tree_of_hidden_ones_is_killed(section: Section) -> None:
    """Three generations, each with a session and an environment of its own."""
    code = (
        "def deeper(n):\n"
        "    if n and os.fork() == 0:\n"
        "        os.setsid()\n"
        "        note(os.getpid())\n"
        "        source = open('/proc/self/cmdline').read().split('\\0')[2]\n"
        "        os.execve(sys.executable, [sys.executable, '-c', source], {'LEFT': str(n - 1)})\n"
        "deeper(int(os.environ.get('LEFT', 3)))\n"
        "time.sleep(60)"
    )
    leader = section.start(code, count=3)
    assert system.kill_marked(section.marker, leader.pid).remaining == ()
    assert section.running() == []


def test_g1_nobody_forks_away_meanwhile(section: Section) -> None:
    """A program that goes on starting hidden children while it is searched leaves none."""
    code = (
        "def run():\n"
        "    while True:\n"
        f"        {HIDDEN}"
        "for _ in range(3): threading.Thread(target=run).start()\n"
    )
    leader = section.start(code, count=5)
    assert system.kill_marked(section.marker, leader.pid, deadline_seconds=10).remaining == ()
    assert section.running() == []


def test_g1_what_is_known_is_killed_after_its_parent_has_ended(section: Section, tmp_path: Path) -> None:
    """An earlier search tells of what belongs to init by now, and of what that has started since."""
    go = tmp_path / "go"
    later = (
        "import os, subprocess, sys, time\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        f"pid = subprocess.Popen({SLEEPER}, env={{}}, start_new_session=True).pid\n"
        f"open({str(section.file)!r}, 'a').write(f'{{pid}}\\n')\n"
        "time.sleep(60)"
    )
    code = (
        f"note(subprocess.Popen([sys.executable, '-c', {later!r}], env={{}}, start_new_session=True).pid)\n"
        "time.sleep(60)"
    )
    leader = section.start(code)
    known = system.find_processes(section.marker, leader.pid)
    assert {process.pid for process in known} == {leader.pid, *section.noted()}

    assert section.process is not None
    section.process.kill()
    section.process.wait()
    assert system.find_marked(section.marker, leader.pid) == []
    go.touch()
    until(lambda: len(section.noted()) == 2)

    report = system.kill_marked(section.marker, leader.pid, start_time=leader.start_time, known=known)
    assert report.remaining == ()
    assert section.running() == []


def test_known_pid_that_belongs_to_somebody_else_is_spared(section: Section) -> None:
    """A pid that was used again since is not what was found."""
    leader = section.start("note(os.getpid()); time.sleep(60)")
    known = [system.ProcessRef(leader.pid, leader.start_time - 1)]
    report = system.kill_marked("wiki.1.other", known=known)
    assert (report.killed, report.remaining) == ((), ())
    earlier = leader.start_time - 1
    assert system.find_processes("wiki.1.other", leader.pid, start_time=earlier) == []
    assert system.kill_marked("wiki.1.other", leader.pid, start_time=earlier).killed == ()
    assert leader.alive()


def test_without_lists_of_children(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that has none (no CONFIG_PROC_CHILDREN): every process tells its parent."""
    leader = section.start(HIDDEN + "time.sleep(60)")
    monkeypatch.setattr(system, "_has_children_files", lambda: False)
    assert set(system.find_marked(section.marker, leader.pid)) == {leader.pid, *section.noted()}


def test_stopped_and_vforking_processes_do_not_delay_the_kill(section: Section) -> None:
    """Whoever is at rest already is not waited for."""
    seconds: list[float] = [1.0]
    for _ in range(20):
        if min(seconds) < system._STOP_SECONDS:  # that long it would wait in each search
            break
        section.file.unlink(missing_ok=True)
        leader = section.start(HIDDEN + "os.kill(os.getpid(), 19)")
        seconds.append(system.kill_marked(section.marker, leader.pid).seconds)
        assert section.process is not None
        section.process.wait(5)
    assert min(seconds) < system._STOP_SECONDS


@pytest.mark.alone
@pytest.mark.alone
def test_plain_program_is_killed_in_milliseconds(section: Section) -> None:
    """G4: a failover does not wait for the search (the best of up to twenty)."""
    seconds: list[float] = [1.0]
    for count in range(1, 21):
        if min(seconds) < 0.03:
            break
        leader = section.start("note(os.getpid()); time.sleep(60)", count)
        seconds.append(system.kill_marked(section.marker, leader.pid, start_time=leader.start_time).seconds)
        assert section.process is not None
        section.process.wait(5)
    assert min(seconds) < 0.03


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can change the user")
def test_process_that_may_not_be_signalled_is_reported(section: Section) -> None:
    """G1: a child that runs as somebody else is no success, and no exception, but remaining."""
    code = (
        "import json, os, sys\n"
        "from phalanx import system\n"
        "os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)\n"
        "report = system.kill_marked('wiki.1.none', int(sys.argv[1]), deadline_seconds=0.2)\n"
        "print(json.dumps([report.killed, report.remaining]))"
    )
    leader = section.start("note(os.getpid()); time.sleep(60)")
    done = subprocess.run(
        [sys.executable, "-c", code, str(leader.pid)],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert json.loads(done.stdout)[1] == [leader.pid], done.stderr


def test_when_nothing_can_be_read_the_group_is_killed(
    section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process without a free descriptor can't search; it kills the group, and says that it saw nothing."""
    leader = section.start("note(os.getpid()); time.sleep(60)")

    def fails(path: str) -> list[str]:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fails)
        with pytest.raises(OSError, match="Too many open files"):
            system.kill_marked(section.marker, leader.pid)
    assert section.process is not None
    assert section.process.wait(5) == -signal.SIGKILL


def test_own_group_is_refused() -> None:
    """Neither the caller's own group nor "every process" is ever taken for a section's."""
    for pgid in (0, 1, os.getpgrp()):
        with pytest.raises(ValueError, match="refusing to signal"):
            system.kill_marked("wiki.1.none", pgid)
