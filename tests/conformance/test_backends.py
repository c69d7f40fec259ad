"""What every backend must do, whatever it runs programs with: ``ports.Backend`` and ``ports.Running``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx import config, system
from phalanx.errors import BackendError, SessionLost
from phalanx.ports import Backend
from phalanx.types import Resource

from .conftest import Recorder, text, until

MakeBackend = Callable[..., Backend]

SLEEPS = "import time; time.sleep(60)"
IGNORES = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(60)"
NEVER_READY = config.FunctionCheck(lambda: False, interval=0.05)


def sets_out(path: Path, then: str) -> str:
    """Code with a child that has left group and session, says so in *path*, and goes on with *then*."""
    return (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"        open({str(path)!r}, 'w').write(str(os.getpid()))\n"
        "        time.sleep(60)\n"
        "    os._exit(0)\n"
        f"while not (os.path.exists({str(path)!r}) and open({str(path)!r}).read()): time.sleep(0.01)\n"
        f"{then}\n"
    )


async def test_registers_before_it_starts(backend: MakeBackend, recorder: Recorder, tmp_path: Path) -> None:
    """G4: the keeper knows the program before it runs, and its group before start() returns."""
    ran = tmp_path / "ran"
    seen: list[bool] = []
    recorder.on_register[1] = lambda resource: asyncio.sleep(0.2, seen.append(ran.exists()))
    recorder.on_register[2] = lambda resource: seen.append(resource.pgid > 0 and resource.start_time > 0)

    running = await backend(f"open({str(ran)!r}, 'w').close(); {SLEEPS}").start(recorder.section)

    assert seen == [False, True]
    assert [kind for kind, _ in recorder.calls] == ["register", "register"]
    (resource,) = recorder.resources.values()
    assert (resource.kind, resource.app, resource.epoch) == ("process", "wiki", 7)
    assert system.ProcessRef(resource.pgid, resource.start_time).alive()
    await running.stop("done")
    assert recorder.calls[-1] == ("unregister", resource.id)


async def test_keeper_that_refuses_lets_nothing_start(
    backend: MakeBackend, recorder: Recorder, tmp_path: Path
) -> None:
    """A refused registration is raised, and the program never ran."""
    ran = tmp_path / "ran"

    def refuse(resource: Resource) -> None:
        raise SessionLost("n1.ab", "gone")

    recorder.on_register[1] = refuse
    with pytest.raises(SessionLost):
        await backend(f"open({str(ran)!r}, 'w').close()").start(recorder.section)
    assert not ran.exists()
    assert not recorder.resources


async def test_session_lost_while_starting_leaves_nothing(backend: MakeBackend, recorder: Recorder) -> None:
    """A program that runs already is killed when the second registration is refused."""

    def refuse(resource: Resource) -> None:
        raise SessionLost("n1.ab", "gone")

    recorder.on_register[2] = refuse
    with pytest.raises(SessionLost):
        await backend(SLEEPS).start(recorder.section)
    assert recorder.left() == []
    assert not recorder.resources


async def test_start_that_does_not_get_ready_leaves_nothing(backend: MakeBackend, recorder: Recorder) -> None:
    """Not ready in time: BackendError of step ready with what the check said; all of it gone."""
    program = backend(
        SLEEPS, ready=config.TcpCheck("127.0.0.1:1", interval=0.05, timeout=0.2), ready_timeout=0.4
    )
    with pytest.raises(BackendError, match=r"not ready within 0\.4 s: cannot connect") as caught:
        await program.start(recorder.section)
    assert caught.value.step == "ready"
    assert recorder.left() == []
    assert not recorder.resources


async def test_program_that_ends_before_it_is_ready(backend: MakeBackend, recorder: Recorder) -> None:
    """It fails at once, not at ready_timeout, and the error holds the program's last words."""
    program = backend("import sys; print('address in use'); sys.exit(3)", ready=NEVER_READY)
    with pytest.raises(
        BackendError, match="exited with code 3 before it was ready: address in use"
    ) as caught:
        async with asyncio.timeout(5):
            await program.start(recorder.section)
    assert caught.value.step == "ready"
    assert not recorder.resources


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.3])
async def test_start_cancelled_at_any_moment_leaves_nothing(
    backend: MakeBackend, recorder: Recorder, delay: float
) -> None:
    """G8: whenever start() is cancelled, when it has ended nothing runs and nothing is registered."""
    start = asyncio.create_task(backend(SLEEPS, ready=NEVER_READY).start(recorder.section))
    await asyncio.sleep(delay)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert recorder.left() == []
    assert not recorder.resources


@pytest.mark.parametrize("registration", [1, 2])
async def test_start_cancelled_while_registering_leaves_nothing(
    backend: MakeBackend, recorder: Recorder, registration: int
) -> None:
    """Also while the keeper's answer is awaited, before or after the spawn, and cancelled twice."""
    reached = asyncio.Event()

    async def hang() -> None:
        reached.set()
        await asyncio.sleep(60)

    recorder.on_register[registration] = lambda resource: hang()
    start = asyncio.create_task(backend(SLEEPS).start(recorder.section))
    await reached.wait()
    start.cancel()
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert recorder.left() == []
    assert not recorder.resources


async def test_waits_until_ready(backend: MakeBackend, recorder: Recorder, tmp_path: Path) -> None:
    """start() returns when the ready check passes, not before."""
    ready = tmp_path / "ready"
    check = config.FunctionCheck(ready.exists, interval=0.05)
    start = asyncio.create_task(
        backend(
            f"import time; time.sleep(0.3); open({str(ready)!r}, 'w'); time.sleep(60)", ready=check
        ).start(recorder.section)
    )
    running = await start
    assert ready.exists()
    await running.kill()


async def test_stop_is_graceful(backend: MakeBackend, recorder: Recorder, tmp_path: Path) -> None:
    """G10: the program gets its signal and the time to end in its own way."""
    said, up = tmp_path / "said", tmp_path / "up"
    code = (
        "import signal, sys, time\n"
        "def bye(*_):\n"
        f"    time.sleep(0.2); open({str(said)!r}, 'w').write('bye'); sys.exit(0)\n"
        f"signal.signal(signal.SIGTERM, bye); open({str(up)!r}, 'w').close()\n"
        "time.sleep(60)"
    )
    running = await backend(code).start(recorder.section)
    await until(up.exists)
    await running.stop("hand-over")
    assert text(said) == "bye"
    assert recorder.left() == []
    assert not recorder.resources
    assert not asyncio.ensure_future(running.ended).done()  # it did not end by itself


async def test_stop_gives_the_whole_group_its_time(
    backend: MakeBackend, recorder: Recorder, tmp_path: Path
) -> None:
    """A worker that ends later than its parent is not killed while there is time (G10)."""
    said, up = tmp_path / "said", tmp_path / "up"
    code = (
        "import os, signal, time\n"
        "def bye(*_):\n"
        f"    time.sleep(0.3); open({str(said)!r}, 'w').write('bye'); os._exit(0)\n"
        "if os.fork() == 0:\n"
        f"    signal.signal(signal.SIGTERM, bye); open({str(up)!r}, 'w').close(); time.sleep(60)\n"
        "time.sleep(60)"
    )
    running = await backend(code).start(recorder.section)
    await until(up.exists)
    await running.stop("hand-over")
    assert text(said) == "bye"
    assert recorder.left() == []


async def test_stop_of_a_deaf_program(
    backend: MakeBackend, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that ignores the signal is killed when its time is up, and not before."""
    caplog.set_level(logging.INFO)
    running = await backend(IGNORES, stop_timeout=0.5).start(recorder.section)
    await until(lambda: "deaf" in caplog.text)
    began = system.now()
    await running.stop("hand-over")
    assert 0.5 <= system.now() - began < 3
    assert recorder.left() == []
    assert not recorder.resources


async def test_kill_is_at_once(
    backend: MakeBackend, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """kill() waits for nothing, and may come in the middle of a stop (fence)."""
    caplog.set_level(logging.INFO)
    running = await backend(IGNORES, stop_timeout=30).start(recorder.section)
    await until(lambda: "deaf" in caplog.text)
    stop = asyncio.create_task(running.stop("hand-over"))
    await asyncio.sleep(0.1)
    assert not stop.done()
    began = system.now()
    await running.kill()
    assert system.now() - began < 1
    assert recorder.left() == []
    await asyncio.wait_for(stop, 5)
    assert [kind for kind, _ in recorder.calls].count("unregister") == 1


async def test_cancelled_kill_kills(backend: MakeBackend, recorder: Recorder) -> None:
    """kill() is shielded: once begun it ends with everything gone, cancelled or not."""
    running = await backend(SLEEPS).start(recorder.section)
    kill = asyncio.create_task(running.kill())
    await asyncio.sleep(0)
    kill.cancel()
    with pytest.raises(asyncio.CancelledError):
        await kill
    assert recorder.left() == []
    assert not recorder.resources


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_children_that_left_the_group_are_killed_too(
    backend: MakeBackend, recorder: Recorder, tmp_path: Path, how: str
) -> None:
    """G1: a daemon with a session of its own, holding the pipe, is gone when stop() or kill() return."""
    path = tmp_path / "child"
    running = await backend(sets_out(path, SLEEPS)).start(recorder.section)
    await until(lambda: text(path))
    escaped = int(text(path))
    async with asyncio.timeout(5):
        await (running.stop("done") if how == "stop" else running.kill())
    assert not system.is_running(escaped)
    assert recorder.left() == []


async def test_program_that_ends_by_itself(backend: MakeBackend, recorder: Recorder) -> None:
    """``ended`` says how; several may wait, and one that gives up disturbs nobody."""
    running = await backend("import time; time.sleep(0.2); raise SystemExit(3)").start(recorder.section)
    impatient = asyncio.ensure_future(running.ended)
    impatient.cancel()
    assert await asyncio.wait_for(running.ended, 5) == "exited with code 3"
    assert await running.ended == "exited with code 3"
    assert recorder.resources, "registered until somebody has seen that nothing is left"
    await running.stop("it ended")
    assert not recorder.resources


async def test_program_that_is_killed_says_so(backend: MakeBackend, recorder: Recorder) -> None:
    """A signal from outside is told from an exit code."""
    running = await backend("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").start(recorder.section)
    assert await asyncio.wait_for(running.ended, 5) == "killed by SIGKILL"
    await running.kill()


async def test_what_an_ended_program_left_is_killed(
    backend: MakeBackend, recorder: Recorder, tmp_path: Path
) -> None:
    """G1: children outlive a program that crashes; stop() ends them, without waiting for stop_timeout."""
    path = tmp_path / "child"
    running = await backend(sets_out(path, "os._exit(1)"), stop_timeout=30).start(recorder.section)
    assert await asyncio.wait_for(running.ended, 5) == "exited with code 1"
    escaped = int(text(path))
    assert system.is_running(escaped)
    began = system.now()
    await running.stop("it ended")
    assert system.now() - began < 3
    assert not system.is_running(escaped)
    assert not recorder.resources


async def test_stopping_twice_is_harmless(backend: MakeBackend, recorder: Recorder) -> None:
    """stop() and kill() after the end do nothing; two stops at once signal once."""
    running = await backend(SLEEPS).start(recorder.section)
    await asyncio.gather(running.stop("one"), running.stop("two"))
    await running.stop("again")
    await running.kill()
    assert [kind for kind, _ in recorder.calls].count("unregister") == 1


async def test_flood_of_output_does_not_hold_up_the_loop(
    backend: MakeBackend, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that prints for ever waits for us, not we for it: the loop turns on, memory does not grow."""
    lines, in_handler, last = 0, 0.0, ""

    class Counts(logging.Handler):
        """A log as slow as a real one."""

        def emit(self, record: logging.LogRecord) -> None:
            nonlocal lines, in_handler, last
            began = system.now()
            lines, last = lines + 1, record.getMessage()
            left_out.extend([last] if "left out" in last else [])
            time.sleep(0.0003)
            in_handler += system.now() - began

    left_out: list[str] = []
    logger, counts = logging.getLogger("phalanx.app.wiki"), Counts()
    logger.addHandler(counts)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        running = await backend("import os\nwhile True: os.write(1, b'y\\n' * 30000)").start(recorder.section)
        await until(lambda: lines > 100)
        worst, since, in_handler = 0.0, system.now(), 0.0
        for _ in range(100):
            began = system.now()
            await asyncio.sleep(0.01)
            worst = max(worst, system.now() - began - 0.01)
        share = in_handler / (system.now() - since)
        began = system.now()
        await running.kill()
        assert system.now() - began < 2
    finally:
        logger.removeHandler(counts)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    assert worst < 0.25
    assert share < 0.5
    assert len(left_out) == 1, "of a full pipe only the last lines are shown, and it says so"
    assert recorder.left() == []


async def test_two_sections_do_not_meet(backend: MakeBackend, recorder: Recorder) -> None:
    """Each start has a marker of its own: the end of one leaves the other alone."""
    maker = backend(SLEEPS)
    one, two = await maker.start(recorder.section), await maker.start(recorder.section)
    await one.kill()
    (left,) = recorder.resources.values()
    assert system.ProcessRef(left.pgid, left.start_time).alive()
    await two.kill()
    assert system.process_start_time(left.pgid) == 0
