"""How nodes end: with hooks that hang, with a log that nobody reads, with a part that has failed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.waiting import until

from phalanx import InternalError, Platform, Role, system
from phalanx.client import PlatformClient
from phalanx.config import NatsOptions
from phalanx.coord.steering import Steering
from phalanx.testing.nats import NatsServer, Ports
from phalanx.testing.nodes import PROGRAM, NodeProcess
from phalanx.testing.stage import since_now, stage

HEAD = """
import asyncio, contextlib, sys, threading, time
from phalanx import Platform

def say(word):
    print(word, flush=True)

p = Platform("test", nats=sys.argv[1], timings={"ttl": 2})
app = p.app("wiki", hook_timeouts={"on_start": 0.5, "on_active": 5, "on_passive": 0.5, "on_stop": 0.5})
"""

HANGS_IN_A_THREAD = """
@app.on_stop
def stop():
    say("in on_stop")
    threading.Event().wait()
"""

DEAF = """
@app.on_stop
async def stop():
    say("in on_stop")
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(100)
"""

BLOCKS_THE_LOOP = """
@app.on_stop
async def stop():
    say("in on_stop")
    time.sleep(10000)
"""

HANGS_AT_THE_START = """
@app.on_start
def start():
    say("in on_start")
    threading.Event().wait()
"""

WITHOUT_UVLOOP = """
sys.modules["uvloop"] = None
"""

RUN = """
p.run()
"""

PORTS = Ports()


@contextmanager
def program(nats: NatsServer, tmp_path: Path, *parts: str, node: str = "n1") -> Generator[NodeProcess]:
    """A node of a program that is made of *parts*. Its output is ``log()``."""
    command = [sys.executable, "-c", "".join((HEAD, *parts, RUN)), nats.urls[0]]
    with running(NodeProcess(command, node, tmp_path / node, PORTS.take(), {})) as process:
        yield process


@contextmanager
def running(process: NodeProcess) -> Generator[NodeProcess]:
    """Start it, and end it whatever happens."""
    process.start()
    try:
        yield process
    finally:
        process.stop()


async def ended(process: NodeProcess, timeout: float) -> int:
    """The exit code; fails the test with the log when it does not come in time."""
    try:
        return await asyncio.to_thread(process.wait, timeout)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running after {timeout:g} s\n{process.log()[-3000:]}")


@pytest.mark.parametrize("loop", ["", WITHOUT_UVLOOP], ids=["uvloop", "asyncio"])
@pytest.mark.parametrize("hook", [HANGS_IN_A_THREAD, DEAF], ids=["thread", "deaf"])
async def test_hook_that_hangs_at_the_end_does_not_keep_the_process(
    nats_server: NatsServer, tmp_path: Path, hook: str, loop: str
) -> None:
    """One SIGTERM: after the hook's deadline the process ends with 0, and its log says what was left."""
    with program(nats_server, tmp_path, loop, hook) as node:
        await until(lambda: "active (epoch" in node.log())
        node.terminate()
        assert await ended(node, 10) == 0
        assert "these hooks do not end" in node.log()
        assert "on_stop of app wiki" in node.log()


async def test_sigterm_ends_a_node_whose_on_start_hangs(nats_server: NatsServer, tmp_path: Path) -> None:
    """The cancellation of the start is not lost in the hook that does not end."""
    with program(nats_server, tmp_path, HANGS_AT_THE_START) as node:
        await until(lambda: "in on_start" in node.log())
        node.terminate()
        assert await ended(node, 10) == 0


@pytest.mark.parametrize("loop", ["", WITHOUT_UVLOOP], ids=["uvloop", "asyncio"])
async def test_second_sigterm_ends_the_process_whatever_blocks_it(
    nats_server: NatsServer, tmp_path: Path, loop: str
) -> None:
    """A hook blocks the event loop at the end: a second SIGTERM ends the process within seconds, with 1."""
    with program(nats_server, tmp_path, loop, BLOCKS_THE_LOOP) as node:
        await until(lambda: "active (epoch" in node.log())
        node.terminate()
        await until(lambda: "in on_stop" in node.log())
        node.terminate()
        assert await ended(node, 10) == 1
        assert "the process does not end (asked twice)" in node.log()


async def test_end_is_bounded_without_a_second_signal_too(nats_server: NatsServer, tmp_path: Path) -> None:
    """The same hook, one SIGTERM: the process ends by itself, later."""
    soon = "import phalanx.platform\nphalanx.platform.END_SECONDS = 1.0\n"
    with program(nats_server, tmp_path, soon, BLOCKS_THE_LOOP) as node:
        await until(lambda: "active (epoch" in node.log())
        node.terminate()
        assert await ended(node, 10) == 1
        assert "its last session is over" in node.log()


async def test_program_goes_on_after_run(nats_server: NatsServer, tmp_path: Path) -> None:
    """A good end is none of the bounds' business: what stands after run() runs, for as long as it likes."""
    soon = "import phalanx.platform\nphalanx.platform.END_SECONDS = -0.5\n"
    later = "import atexit\natexit.register(lambda: (time.sleep(3), say('all done')))\n"
    with program(nats_server, tmp_path, soon, later) as node:
        await until(lambda: "active (epoch" in node.log())
        node.terminate()
        assert await ended(node, 10) == 0
        assert "all done" in node.log()


async def test_g1_second_sigterm_leaves_no_section_behind(nats_server: NatsServer, tmp_path: Path) -> None:
    """An active section that does not end, two SIGTERMs: the process is gone before another begins."""
    with stage(tmp_path, nats_server, count=2, fault="deaf", fault_node="n1", priority=0) as s:  # type: ignore[arg-type]
        active = await s.settled()
        if active != "n1":
            s.nodes[active].kill()
            await s.nodes.wait_for_active("wiki", other_than=active)
            s.nodes[active].start()
            await s.nodes.wait_for_standbys("wiki", 1)
        asked = since_now()
        s.nodes["n1"].terminate()
        await until(lambda: "stopping" in s.nodes["n1"].log())
        s.nodes["n1"].terminate()
        await ended(s.nodes["n1"], 12)
        began = await s.next_active(asked)
        assert began.node == "n2"
        s.check()


STUCK_APP = """
import os
import phalanx.node.sessions
phalanx.node.sessions.STUCK_SECONDS = 1.0
stuck = p.app("stuck")

@stuck.on_active
async def stuck_active(ctx):
    ctx.ready()
    while True:
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            if ctx.node != "n1":
                raise

@app.on_active
async def active(ctx):
    say("wiki begins")

@app.on_passive
async def passive(ctx):
    say("wiki ends gracefully")
"""


async def test_app_that_does_not_end_holds_no_other_app(nats_server: NatsServer, tmp_path: Path) -> None:
    """Before the node ends itself because of one app, the other has moved: gracefully, and named.

    What keeps a section may outlive the node (a process in state D); then the keeper holds the session.
    """
    with (
        program(nats_server, tmp_path, STUCK_APP) as first,
        contextlib.ExitStack() as stack,
    ):
        await until(lambda: first.log().count("active (epoch") == 2)
        second = stack.enter_context(program(nats_server, tmp_path, STUCK_APP, node="n2"))
        async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:
            await until(lambda: second.is_standby("wiki"))
            asking = asyncio.create_task(client.step_down("stuck", timeout=3, wait=False))
            await until(lambda: "wiki ends gracefully" in first.log())
            await until(lambda: "wiki begins" in second.log())
            assert await ended(first, 10) == -signal.SIGKILL
            await asyncio.gather(asking, return_exceptions=True)
        assert "app wiki: released (epoch 1): app stuck does not end" in first.log()
        assert "app stuck does not end, so the node will; to n2" in first.log()
        assert "this node kills itself" in first.log()


LATE_APP = """
import phalanx.node.sessions
phalanx.node.sessions.STUCK_SECONDS = 0.5
late, go = p.app("late"), asyncio.Event()

@late.on_active
async def late_active(ctx):
    ctx.ready()
    while not go.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)

@app.on_active
async def active(ctx):
    say(f"wiki begins, {ctx.epoch}")

@app.on_passive
async def passive(ctx):
    go.set()
    await asyncio.sleep(0.4)
"""


async def test_app_that_ends_at_the_last_moment_costs_no_node(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """It ends while the others are handed over: the node lives, and they are candidates again."""
    with program(nats_server, tmp_path, LATE_APP) as node:
        await until(lambda: node.log().count("active (epoch") == 2)
        async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:
            asking = asyncio.create_task(client.step_down("late", timeout=10, wait=False))
            await until(lambda: node.log().count("wiki begins") == 2)
            await asyncio.gather(asking, return_exceptions=True)
        assert "app late does not end, so the node will" in node.log()
        assert node.is_active("wiki")


# --- a part that fails


async def fails(self: Steering, active: Callable[[], list[str]]) -> None:
    """Stands for a bug in a task of the node's whole life, which shows when an app is active."""
    while not active():  # noqa: ASYNC110 - as the real one, it has only this
        await asyncio.sleep(0.02)
    raise RuntimeError("no such thing")


def in_process(nats: NatsServer, tmp_path: Path) -> Platform:
    """A node in this process."""
    return Platform(
        "test", node="n1", nats=nats.urls, data_dir=str(tmp_path / "n1"), http={"enabled": False},
        timings={"ttl": 2},
    )  # fmt: skip


async def test_internal_error_is_raised_by_wait(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wait() raises InternalError with the cause, after the app was handed over gracefully."""
    monkeypatch.setattr(Steering, "run", fails)
    calls = list[str]()
    platform = in_process(nats_server, tmp_path)
    app = platform.app("wiki")
    app.on_active(lambda: calls.append("active"))
    app.on_passive(lambda: calls.append("passive"))
    await platform.start()
    with pytest.raises(InternalError, match="internal error in steering: RuntimeError: no such thing") as e:
        await platform.wait()
    assert isinstance(e.value.__cause__, RuntimeError)
    assert calls == ["active", "passive"]
    with pytest.raises(InternalError):
        await platform.stop()
    await platform.stop()


async def test_internal_error_is_raised_at_the_end_of_async_with(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody waits; but an error of the body goes first."""
    monkeypatch.setattr(Steering, "run", fails)
    platform = in_process(nats_server, tmp_path)
    app = platform.app("wiki")
    with pytest.raises(InternalError):
        async with platform:
            await platform.wait_for_role("wiki", Role.STOPPED)
    assert app.role is Role.STOPPED

    async def body_fails() -> None:
        second = in_process(nats_server, tmp_path)
        second.app("wiki")
        async with second:
            with contextlib.suppress(InternalError):
                await second.wait()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body_fails()


async def test_internal_error_ends_the_process_with_1(nats_server: NatsServer, tmp_path: Path) -> None:
    """run() exits with 1, and the last line of the log names the part and the reason."""
    broken = """
from phalanx.coord.steering import Steering
async def fails(self, active):
    while not active():
        await asyncio.sleep(0.02)
    raise RuntimeError("no such thing")
Steering.run = fails
"""
    with program(nats_server, tmp_path, broken) as node:
        assert await ended(node, 15) == 1
        assert "internal error in steering: RuntimeError: no such thing" in node.log().splitlines()[-1]


# --- a log that nobody reads


BACKEND = """#!/bin/sh
echo $$ > {runs}/new.$PHALANX_NODE
mv {runs}/new.$PHALANX_NODE {runs}/backend.$PHALANX_NODE
exec sleep 1000
"""


class Unread(NodeProcess):
    """A node whose output goes into something that nobody reads."""

    output = -1

    def start(self) -> None:
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            env={**os.environ, "PHALANX_NODE": self.node, "PHALANX_DATA": str(self.data_dir), **self.env},
            start_new_session=True,
        )


def fill(descriptor: int) -> None:
    """Write into a pipe or socket until it takes nothing more."""
    os.set_blocking(descriptor, False)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(descriptor, b"x" * size)
    os.set_blocking(descriptor, True)


@contextmanager
def nobody_reads(kind: str) -> Generator[int]:
    """The writer's end of a pipe, or of a socket as systemd's journal gives it."""
    if kind == "pipe":
        ends = os.pipe()
    else:
        ours, theirs = socket.socketpair()
        ends = ours.detach(), theirs.detach()
    try:
        yield ends[1]
    finally:
        for end in ends:
            os.close(end)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("fault", ["frozen", "killed"])
async def test_g1_keeper_fences_while_nobody_reads_its_log(
    nats_server: NatsServer, tmp_path: Path, fault: str, kind: str
) -> None:
    """Standard error is full and nobody reads it: the backend is dead before another node's begins."""
    script = tmp_path / "backend.sh"
    script.write_text(BACKEND.format(runs=tmp_path))
    script.chmod(0o755)
    settings = {
        "history": str(tmp_path / "history"), "urls": nats_server.urls, "hooks": False,
        "backend": str(script), "ttl": 2.0,
    }  # fmt: skip
    env = {"PHALANX_TEST": json.dumps(settings)}

    def backend(node: str) -> int:
        file = tmp_path / f"backend.{node}"
        return int(file.read_text()) if file.exists() else 0

    first = Unread(PROGRAM, "n1", tmp_path / "n1", 0, {**env, "PHALANX_HTTP": f"127.0.0.1:{PORTS.take()}"})
    second = NodeProcess(PROGRAM, "n2", tmp_path / "n2", PORTS.take(), env)
    with nobody_reads(kind) as first.output, running(first):
        await until(lambda: backend("n1"))
        with running(second):
            await until(lambda: second.is_standby("wiki"))
            fill(first.output)
            if fault == "frozen":
                first.freeze()
            else:
                first.kill()
            await until(lambda: backend("n2"))
            assert not system.is_running(backend("n1")), "both ran at once"


def test_nothing_that_a_keeper_writes_waits_for_a_reader() -> None:
    """Other loggers than ours, from its very start; and a traceback on standard error itself."""
    code = """
import logging, sys
sys.argv = ["keeper", "0", "0"]
from phalanx.keeper.hardening import log_without_waiting
log_without_waiting()
for name in ("asyncio", "nats", "phalanx.keeper"):
    for _ in range(50):
        logging.getLogger(name).error("x" * 5000)
for _ in range(50):
    try:
        print("x" * 5000, file=sys.stderr, flush=True)
    except BlockingIOError:
        pass
raise RuntimeError("a traceback")
"""
    with nobody_reads("pipe") as end:
        fill(end)
        process = subprocess.Popen([sys.executable, "-c", code], stderr=end)
        try:
            assert process.wait(15) != 0
        finally:
            process.kill()
            process.wait()
        assert os.get_blocking(end), "the mode of a pipe is shared: it must stay as it was"
