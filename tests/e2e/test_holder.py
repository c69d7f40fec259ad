"""What a holder keeps for the next life of its node, and when it keeps nothing: real programs, real kills."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from tests.waiting import until

from phalanx import config, system
from phalanx.backends import Holder, ProcessBackend, holder, process
from phalanx.decide.keeper import AWAY_SECONDS
from phalanx.keeper import note
from phalanx.ports import Running, SectionContext
from phalanx.testing.holders import holder_of
from phalanx.types import ProgramState, Resource, SessionId


class Lives:
    """The lives of one node in *folder*, one after the other. The keeper is this process, in a pause."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._holders: list[Holder] = []
        self.known: dict[str, Resource] = {}
        note.write(folder, SessionId("n1", "ab"))

    @property
    def holder_pid(self) -> int:
        """The holder that runs; 0: none."""
        return holder_of(self._folder)

    @property
    def holder(self) -> Holder:
        """That of the present life, which has a backend already."""
        return self._holders[-1]

    def backend(self, command: list[str] | None = None, stop_timeout: float = 5.0) -> ProcessBackend:
        """That of the present life."""
        program = config.Process(command or ["true"], stop_timeout=stop_timeout)
        declared = config.build_app("wiki", config.ActivePassive(), backend=program).backend
        assert isinstance(declared, config.Process)
        if not self._holders:
            self._holders.append(Holder(self._folder))
        return ProcessBackend(declared, self._holders[-1])

    def section(self, epoch: int = 12) -> SectionContext:
        """One that registers with us."""
        return SectionContext("prod", "n1", "wiki", epoch, self._register, self._unregister)

    async def _register(self, resource: Resource) -> None:
        self.known[resource.id] = resource

    def _unregister(self, resource_id: str) -> None:
        self.known.pop(resource_id, None)

    async def start(self, code: str) -> Resource:
        """Start a program in Python: how the keeper knows it."""
        await self.backend([sys.executable, "-uc", code]).start(self.section())
        (resource,) = self.known.values()
        assert resource.adoptable
        return resource

    async def leave(self) -> None:
        """The node ends."""
        await self._holders.pop().close()

    async def adopt(self, resource: Resource, epoch: int = 12) -> Running | None:
        """The next life takes it up."""
        return await self.backend().adopt(self.section(epoch), resource)

    async def close(self) -> None:
        """Nothing is left of it."""
        note.remove(self._folder)
        for made in self._holders:
            await made.close()
        if pid := self.holder_pid:
            os.kill(pid, signal.SIGKILL)
        for resource in self.known.values():
            await asyncio.to_thread(system.kill_marked, resource.id, resource.pgid)


@pytest.fixture
async def lives(tmp_path: Path) -> AsyncIterator[Lives]:
    """None has begun yet."""
    made = Lives(tmp_path)
    yield made
    await made.close()


def touch_when(there: Path, say: str) -> str:
    """Code that waits for a file, says something, and makes another one."""
    return (
        f"import os, sys, time\nprint('up')\nwhile not os.path.exists({str(there)!r}): time.sleep(0.01)\n"
        f"{say}\nopen({str(there) + '.done'!r}, 'w').close()\n"
    )


async def test_output_of_the_gap_reaches_the_log(lives: Lives, lines: list[str], tmp_path: Path) -> None:
    """Before, meanwhile, and afterwards: each line once, in order; the program never waits for a reader."""
    go, again = tmp_path / "go", tmp_path / "again"
    code = touch_when(go, "for n in range(1000): print('gap', n)") + touch_when(again, "print('after')")
    resource = await lives.start(code + "time.sleep(60)")
    await until(lambda: lines == ["up"])
    await lives.leave()
    go.touch()
    await until(Path(f"{go}.done").exists)
    running = await lives.adopt(resource)
    assert running is not None
    again.touch()
    await until(lambda: lines[-1] == "after")
    assert lines == ["up", *(f"gap {n}" for n in range(1000)), "up", "after"]
    status = running.status()
    assert (status.state, status.what) == (ProgramState.RUNNING, f"process {resource.pgid}")
    await running.stop("done")
    assert not system.is_running(resource.pgid)
    assert not lives.known


async def test_flood_of_output_in_the_gap(lives: Lives, lines: list[str], tmp_path: Path) -> None:
    """The newest of it is kept, and it is said how much is not; the program does not block, or die of it."""
    go = tmp_path / "go"
    flood = "for n in range(200): os.write(1, (b'%05d' % n + b'x' * 4000 + b'\\n'))"
    resource = await lives.start(touch_when(go, flood) + "time.sleep(60)")
    await lives.leave()
    go.touch()
    await until(Path(f"{go}.done").exists)
    running = await lives.adopt(resource)
    assert running is not None
    await until(lambda: lines[-1].startswith("00199"))
    (dropped,) = (int(line.split()[0].lstrip("[")) for line in lines if "bytes left out" in line)
    assert dropped == 200 * 4006 + len("up\n") * ("up" not in lines) - (1 << 18)
    await running.kill()


@pytest.mark.parametrize(
    ("end", "how"), [("sys.exit(3)", "exited with code 3"), ("os.kill(0, 9)", "SIGKILL")]
)
async def test_exit_code_of_a_program_that_ends_in_the_gap(
    lives: Lives, lines: list[str], tmp_path: Path, end: str, how: str
) -> None:
    """The next life hears how it ended, and its last words."""
    go = tmp_path / "go"
    resource = await lives.start(touch_when(go, f"print('last words')\n{end}"))
    await lives.leave()
    go.touch()
    await until(lambda: not system.is_running(resource.pgid))
    running = await lives.adopt(resource)
    assert running is not None
    ended = await asyncio.wait_for(asyncio.ensure_future(running.ended), 10)
    assert how in ended
    assert "while the node was away" in ended
    assert running.status().state is ProgramState.ENDED
    assert lines[-1] == "last words"
    await running.stop("it ended")
    assert not lives.known


async def test_exit_code_of_a_program_that_ends_while_it_is_taken_up(lives: Lives) -> None:
    """The holder tells of the end before it answers: the code is not lost."""
    resource = await lives.start("import time; time.sleep(60)")
    await lives.leave()
    section = lives.section()
    taking = lives.backend()
    await lives.holder.claim(resource.id)
    os.kill(lives.holder_pid, signal.SIGSTOP)
    try:
        adopting = asyncio.create_task(taking.adopt(section, resource))
        await until(lambda: lives.holder._link._asked)  # pyright: ignore
        os.kill(resource.pgid, signal.SIGUSR1)
        await until(lambda: not system.is_running(resource.pgid))
    finally:
        os.kill(lives.holder_pid, signal.SIGCONT)
    running = await asyncio.wait_for(adopting, 10)
    assert running is not None
    ended = await asyncio.wait_for(asyncio.ensure_future(running.ended), 10)
    assert "SIGUSR1" in ended
    await running.stop("it ended")


async def test_exit_code_of_a_program_that_ends_before_its_start_is_noticed(lives: Lives) -> None:
    """What the holder answers and that it has ended are read at once: the code is not lost."""
    lives.backend()
    await lives.holder.claim("none")
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        spawning = asyncio.create_task(
            lives.holder.spawn(
                "wiki.12.0123456789abcdef",
                ["/bin/sh", "-c", "exit 7"],
                env={},
                cwd="",
                identity=None,
                stdin=null,
                group=None,
                on_line=print,
                on_exit=list,
            )
        )
        link = lives.holder._link  # pyright: ignore
        assert link is not None
        while not link._asked:  # noqa: ASYNC110  # pyright: ignore
            await asyncio.sleep(0)
        deadline = system.now() + 10
        while b'"ended"' not in peek(link._channel):  # pyright: ignore
            assert system.now() < deadline  # nothing else runs meanwhile: the loop stands still
        process = await asyncio.wait_for(spawning, 10)
    finally:
        os.close(null)
    await asyncio.wait_for(process.exited.wait(), 10)
    assert (process.how, process.code) == ("exited with code 7", 7)
    process.reap()


def peek(channel: socket.socket) -> bytes:
    """What there is to be read."""
    try:
        return channel.recv(1 << 16, socket.MSG_PEEK)
    except BlockingIOError:
        return b""


async def test_adopted_program_that_ends_later_says_how(lives: Lives, tmp_path: Path) -> None:
    """Its parent is the holder still, which tells the life that is there."""
    go = tmp_path / "go"
    resource = await lives.start(touch_when(go, "sys.exit(5)"))
    await lives.leave()
    running = await lives.adopt(resource)
    assert running is not None
    go.touch()
    ended = await asyncio.wait_for(asyncio.ensure_future(running.ended), 10)
    assert ended == "exited with code 5"
    await running.stop("it ended")


WRONG: dict[str, Callable[[Resource], tuple[Resource, int]]] = {
    "start time": lambda r: (msgspec.structs.replace(r, start_time=r.start_time + 1), 12),
    "pid": lambda r: (msgspec.structs.replace(r, pgid=r.pgid + 100_000), 12),
    "epoch": lambda r: (r, 13),
    "app": lambda r: (msgspec.structs.replace(r, app="other"), 12),
    "mark": lambda r: (msgspec.structs.replace(r, id="wiki.12.0000"), 12),
}


@pytest.mark.parametrize("what", WRONG)
async def test_g1_what_is_not_the_very_program_is_not_adopted(lives: Lives, what: str) -> None:
    """Process, start, section: where one of them differs nothing is taken up, and what was left is ended."""
    resource = await lives.start("import time; time.sleep(60)")
    await lives.leave()
    asked, epoch = WRONG[what](resource)
    assert await lives.adopt(asked, epoch) is None
    if what in ("start time", "pid", "epoch", "app"):
        await until(lambda: not system.is_running(resource.pgid))


def zombies_of(holder_pid: int) -> list[int]:
    """Children that have ended and are held on to."""
    text = Path(f"/proc/{holder_pid}/task/{holder_pid}/children").read_text()
    return [pid for pid in map(int, text.split()) if not system.is_running(pid)]


async def test_what_is_not_adopted_is_let_go_of(lives: Lives) -> None:
    """Its holder, which lives on, keeps neither its pid nor its pipe."""
    resource = await lives.start("import time; time.sleep(60)")
    await lives.leave()
    assert await lives.adopt(resource, epoch=13) is None
    await until(lambda: not zombies_of(lives.holder_pid))
    assert await lives.holder.claim(resource.id) is None


async def test_start_lets_go_of_an_earlier_life_before_it_looks_for_groups_that_nobody_holds(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else the empty control group of that would be there until the start after this one."""
    resource = await lives.start("import time; time.sleep(60)")
    await lives.leave()
    os.killpg(resource.pgid, signal.SIGKILL)
    await until(lambda: not system.is_running(resource.pgid))
    backend, seen = lives.backend(["sleep", "60"]), list[list[int]]()
    await lives.holder.claim(resource.id)
    fence = process._fence  # pyright: ignore

    def look(app: str, names: str) -> list[str]:
        seen.append(zombies_of(lives.holder_pid))
        return fence(app, names)

    monkeypatch.setattr(process, "_fence", look)
    running = await backend.start(lives.section())
    assert seen == [[]]
    await running.kill()


async def test_g1_holder_that_was_killed_in_the_gap_has_left_nothing(lives: Lives) -> None:
    """The kernel ends the program with it; the next life starts with another one."""
    resource = await lives.start("import time; time.sleep(60)")
    await lives.leave()
    before = system.ProcessRef.of(lives.holder_pid)
    os.kill(before.pid, signal.SIGKILL)
    await until(lambda: not system.is_running(resource.pgid))
    assert await lives.adopt(resource) is None
    running = await lives.backend(["sleep", "60"]).start(lives.section())
    assert (
        system.process_start_time(before.pid) != before.start_time
    )  # of our child not even a zombie is left
    await running.kill()


async def test_g1_holder_of_another_version_is_ended_with_what_it_holds(
    lives: Lives, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A later Phalanx says so in the log, and begins anew; the words for that keep their form for ever."""
    resource = await lives.start("import time; time.sleep(60)")
    await lives.leave()
    before = lives.holder_pid
    monkeypatch.setattr(holder, "VERSION", holder.VERSION + 1)
    assert await lives.backend()._holder._meet() is None  # pyright: ignore
    assert "speaks version 1, not 2: what it holds ends" in caplog.text
    assert not system.is_running(resource.pgid)
    await until(lambda: not system.is_running(before))


def test_holder_means_the_same_as_the_node_by_what_both_have_written_down() -> None:
    """It is written down twice, as the holder's process imports nothing of Phalanx."""
    code = Path(holder.__file__).with_name("holder_process.py").read_text()
    assert f"\nVERSION = {holder.VERSION}\n" in code
    assert f'\nMARKER_ENV = "{system.MARKER_ENV}"\n' in code
    assert f'\n_NOTE = "{note.NOTE}"\n' in code
    assert float(code.partition("\nAWAY_SECONDS = ")[2].split()[0]) > AWAY_SECONDS


async def test_g1_holder_ends_what_it_holds_when_the_keeper_has_gone_too(
    lives: Lives, tmp_path: Path
) -> None:
    """Node and keeper are dead, and nobody else looks: program and holder end."""
    keeper = await asyncio.create_subprocess_exec("sleep", "60")
    resource = await lives.start("import time; time.sleep(60)")
    name_keeper(tmp_path, keeper.pid)
    pid = lives.holder_pid
    await lives.leave()
    await asyncio.sleep(0.5)
    assert system.is_running(resource.pgid)
    keeper.kill()
    await keeper.wait()
    await until(lambda: not system.is_running(resource.pgid))
    await until(lambda: not system.is_running(pid))


async def test_g1_holder_does_not_wait_for_a_keeper_that_stands_still(lives: Lives, tmp_path: Path) -> None:
    """Nobody renews the session then: what runs ends within some seconds."""
    keeper = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        resource = await lives.start("import time; time.sleep(60)")
        name_keeper(tmp_path, keeper.pid)
        await lives.leave()
        os.kill(keeper.pid, signal.SIGSTOP)
        await until(lambda: not system.is_running(resource.pgid))
    finally:
        keeper.kill()
        await keeper.wait()


def name_keeper(folder: Path, pid: int) -> None:
    """Have the note name that process."""
    written = json.loads((folder / note.NOTE).read_text())
    written |= {"pid": pid, "start_time": system.process_start_time(pid)}
    (folder / note.NOTE).write_text(json.dumps(written))


async def test_g1_without_a_pause_nothing_outlives_the_node(lives: Lives, tmp_path: Path) -> None:
    """No keeper is to be waited for: a daemon that has left group and session ends, too."""
    note.remove(tmp_path)
    said = tmp_path / "daemon"
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"        open({str(said)!r}, 'w').write(str(os.getpid()) + '\\n'); time.sleep(60)\n"
        "    os._exit(0)\n"
        "time.sleep(60)"
    )
    await lives.start(code)
    await until(lambda: said.exists() and said.read_text().endswith("\n"))
    daemon, pid = system.ProcessRef.of(int(said.read_text())), lives.holder_pid
    await lives.leave()
    await until(lambda: not daemon.alive())
    await until(lambda: not system.is_running(pid))


async def test_g7_stop_under_way_ends_when_the_program_was_killed_and_its_holder_says_nothing(
    lives: Lives, tmp_path: Path
) -> None:
    """Who killed it need not wait for the holder, and neither need who waits for its graceful end."""
    deaf = tmp_path / "deaf"
    code = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(deaf)!r}, 'w').close()\ntime.sleep(600)"
    )
    backend = lives.backend([sys.executable, "-uc", code], stop_timeout=120)
    running = await backend.start(lives.section())
    await until(deaf.exists)
    stopping = asyncio.create_task(running.stop("hand-over"))
    await until(lambda: running.status().state is ProgramState.STOPPING)
    frozen = lives.holder_pid
    os.kill(frozen, signal.SIGSTOP)
    try:
        await running.kill()
        async with asyncio.timeout(20):
            await stopping
    finally:
        os.kill(frozen, signal.SIGCONT)


async def test_second_node_is_turned_away(
    lives: Lives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as one is connected, another one gets nothing, and does the first one no harm."""
    monkeypatch.setattr(holder, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(holder, "_kill", id)
    resource = await lives.start("import time; time.sleep(60)")
    other = Holder(tmp_path)
    assert await other._meet() is None  # pyright: ignore
    assert system.is_running(resource.pgid)


def test_process_says_who_starts_it() -> None:
    """By hand it does nothing."""
    file = Path(holder.__file__).with_name("holder_process.py")
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(file)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "started by a node" in done.stderr) == (1, True)
    with contextlib.suppress(FileNotFoundError):
        assert done.stdout == ""
