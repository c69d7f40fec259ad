"""What every backend must do, whatever it runs programs with: ``ports.Backend`` and ``ports.Running``."""

from __future__ import annotations

import asyncio

import pytest
from tests.waiting import until

from phalanx import system
from phalanx.errors import BackendError, SessionLost
from phalanx.ports import Running
from phalanx.testing.fake_backend import Behaviour
from phalanx.types import ProgramState, Resource

from .conftest import Recorder
from .stages import FENCING, REGISTRATIONS, Stage, param

SERVES = Behaviour()
IGNORES_STOP = Behaviour(stop_seconds=None)
CRASHES = Behaviour(ends_seconds=0.2, exit_code=3)
LEAVES_A_DAEMON = Behaviour(daemon=True)

each_registration = pytest.mark.parametrize(
    ("stage", "registration"),
    [param(name, number + 1) for name, count in REGISTRATIONS.items() for number in range(count)],
    indirect=["stage"],
)
"""Each backend, at each registration of a start of its."""


async def start(stage: Stage, recorder: Recorder, behaviour: Behaviour, **options: float) -> Running:
    """Start it, and wait until the program has come so far that it knows what to do with a signal."""
    running = await stage.backend(behaviour, **options).start(recorder.section)  # pyright: ignore
    await until(lambda: stage.has_said("started"))
    return running


def assert_nothing_is_left(stage: Stage, recorder: Recorder) -> None:
    """Nothing runs, and nothing is registered."""
    assert stage.left() == []
    assert not recorder.resources


# --- start


@pytest.mark.parametrize(
    ("stage", "registrations"),
    [param(name, count) for name, count in REGISTRATIONS.items()],
    indirect=["stage"],
)
async def test_registers_before_it_starts(stage: Stage, recorder: Recorder, registrations: int) -> None:
    """G4: the keeper knows the program before it runs, and all that it needs before start() returns."""
    seen: list[bool] = []
    for number in range(1, registrations + 1):
        recorder.on_register[number] = lambda resource: asyncio.sleep(
            0.2, seen.append(stage.has_said("started"))
        )
    running = await stage.backend(SERVES).start(recorder.section)
    assert seen == [False] * registrations
    assert recorder.count("register") == len(recorder.calls) >= registrations
    (resource,) = recorder.resources.values()
    assert (resource.kind, resource.app, resource.epoch) == (stage.kind, stage.app, 7)
    await until(lambda: stage.has_said("started"))
    assert stage.left()
    await running.stop("done")
    assert recorder.calls[-1] == ("unregister", resource.id)
    assert_nothing_is_left(stage, recorder)


@each_registration
async def test_keeper_that_refuses_lets_nothing_run(
    stage: Stage, recorder: Recorder, registration: int
) -> None:
    """A refused registration, of the session that was lost, is raised, and the program never ran."""

    def refuse(resource: Resource) -> None:
        raise SessionLost("n1.ab", "gone")

    recorder.on_register[registration] = refuse
    with pytest.raises(SessionLost):
        await stage.backend(SERVES).start(recorder.section)
    assert not stage.has_said("started")
    assert_nothing_is_left(stage, recorder)


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.3])
async def test_start_cancelled_at_any_moment_leaves_nothing(
    stage: Stage, recorder: Recorder, delay: float
) -> None:
    """G8: whenever start() is cancelled, when it has ended nothing runs and nothing is registered."""
    starting = asyncio.create_task(stage.backend(SERVES).start(recorder.section))
    await asyncio.sleep(delay)
    starting.cancel()
    try:
        running = await starting
    except asyncio.CancelledError:
        pass
    else:
        await running.kill()
    assert_nothing_is_left(stage, recorder)


@each_registration
async def test_start_cancelled_while_registering_leaves_nothing(
    stage: Stage, recorder: Recorder, registration: int
) -> None:
    """Also while the keeper's answer is awaited, and cancelled twice."""
    reached = asyncio.Event()

    async def hang() -> None:
        reached.set()
        await asyncio.sleep(60)

    recorder.on_register[registration] = lambda resource: hang()
    starting = asyncio.create_task(stage.backend(SERVES).start(recorder.section))
    await reached.wait()
    starting.cancel()
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not stage.has_said("started")
    assert_nothing_is_left(stage, recorder)


async def test_program_that_cannot_be_started(stage: Stage, recorder: Recorder) -> None:
    """No such program, image or unit: said by prepare() and by start(), with a remedy; nothing registered."""
    backend = stage.backend(Behaviour(missing=True))
    for attempt in (backend.prepare(stage.app), backend.start(recorder.section)):
        with pytest.raises(BackendError) as caught:
            await attempt
        assert (caught.value.app, caught.value.step) == (stage.app, "prepare")
        assert caught.value.remedy
    assert_nothing_is_left(stage, recorder)


async def test_prepare_starts_nothing(stage: Stage, recorder: Recorder) -> None:
    """It only looks."""
    await stage.backend(SERVES).prepare(stage.app)
    await asyncio.sleep(0.2)
    assert not stage.has_said("started")
    assert_nothing_is_left(stage, recorder)


# --- ready


async def test_without_a_check_it_is_ready_at_once(stage: Stage, recorder: Recorder) -> None:
    """Nothing to wait for, though the program itself takes its time."""
    running = await stage.backend(Behaviour(ready_seconds=None)).start(recorder.section)
    async with asyncio.timeout(5):
        await running.wait_ready()
    assert running.status().state is ProgramState.RUNNING
    await running.kill()


async def test_slow_start_is_waited_for(stage: Stage, recorder: Recorder) -> None:
    """start() does not wait for readiness; wait_ready() returns when the check passes, not before."""
    running = await stage.backend(Behaviour(ready_seconds=0.7), ready=True).start(recorder.section)
    assert not stage.has_said("ready")
    await running.wait_ready()
    assert stage.has_said("ready")
    assert not asyncio.ensure_future(running.ended).done()
    await running.kill()
    assert_nothing_is_left(stage, recorder)


async def test_program_that_does_not_get_ready(stage: Stage, recorder: Recorder) -> None:
    """BackendError of step ready, in time; whoever waited kills it then."""
    running = await stage.backend(Behaviour(ready_seconds=None), ready=True, ready_timeout=0.5).start(
        recorder.section
    )
    with pytest.raises(BackendError, match=r"not ready within 0\.5 s") as caught:
        await running.wait_ready()
    assert caught.value.step == "ready"
    await running.kill()
    assert_nothing_is_left(stage, recorder)


async def test_program_that_exits_before_it_is_ready(stage: Stage, recorder: Recorder) -> None:
    """It fails at once, not at ready_timeout, and says how the program ended."""
    behaviour = Behaviour(ready_seconds=None, ends_seconds=0.2, exit_code=3)
    running = await stage.backend(behaviour, ready=True, ready_timeout=60).start(recorder.section)
    with pytest.raises(BackendError, match="code 3") as caught:
        async with asyncio.timeout(10):
            await running.wait_ready()
    assert caught.value.step == "ready"
    await running.kill()
    assert_nothing_is_left(stage, recorder)


async def test_cancelled_wait_for_readiness_leaves_it_running(stage: Stage, recorder: Recorder) -> None:
    """To wait is no more than that: it can be given up, and the program be ended in order."""
    running = await stage.backend(Behaviour(ready_seconds=None), ready=True).start(recorder.section)
    waiting = asyncio.create_task(running.wait_ready())
    await until(lambda: stage.has_said("started"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert stage.left()
    await running.stop("done")
    assert stage.has_said("bye")
    assert_nothing_is_left(stage, recorder)


# --- end


async def test_stop_is_graceful(stage: Stage, recorder: Recorder) -> None:
    """G10: the program gets its signal and the time to end in its own way."""
    running = await start(stage, recorder, Behaviour(stop_seconds=0.3))
    stopping = asyncio.create_task(running.stop("hand-over"))
    await asyncio.sleep(0.05)
    assert running.status().state is ProgramState.STOPPING
    await stopping
    assert stage.has_said("bye")
    assert running.status().state is ProgramState.ENDED
    assert not asyncio.ensure_future(running.ended).done()  # it did not end by itself
    assert_nothing_is_left(stage, recorder)


async def test_stop_of_a_program_that_ignores_it(stage: Stage, recorder: Recorder) -> None:
    """It is killed when its time is up, and not before."""
    running = await start(stage, recorder, IGNORES_STOP, stop_timeout=1.0)
    began = system.now()
    await running.stop("hand-over")
    assert 0.9 <= system.now() - began < 15
    assert not stage.has_said("bye")
    assert_nothing_is_left(stage, recorder)


async def test_kill_is_at_once(stage: Stage, recorder: Recorder) -> None:
    """kill() waits for nothing, and may come in the middle of a stop (fence)."""
    running = await start(stage, recorder, IGNORES_STOP, stop_timeout=30)
    stopping = asyncio.create_task(running.stop("hand-over"))
    await asyncio.sleep(0.1)
    assert not stopping.done()
    began = system.now()
    await running.kill()
    assert system.now() - began < 10
    assert stage.left() == []
    async with asyncio.timeout(5):
        await stopping
    assert recorder.count("unregister") == 1


async def test_cancelled_kill_kills(stage: Stage, recorder: Recorder) -> None:
    """kill() is shielded: once begun it ends with everything gone, cancelled or not."""
    running = await start(stage, recorder, SERVES)
    kill = asyncio.create_task(running.kill())
    await asyncio.sleep(0)
    kill.cancel()
    with pytest.raises(asyncio.CancelledError):
        await kill
    assert_nothing_is_left(stage, recorder)


async def test_stopping_twice_is_harmless(stage: Stage, recorder: Recorder) -> None:
    """stop() and kill() after the end do nothing; two stops at once end it once."""
    running = await start(stage, recorder, SERVES)
    await asyncio.gather(running.stop("one"), running.stop("two"))
    await running.stop("again")
    await running.kill()
    assert recorder.count("unregister") == 1


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_children_that_left_the_group_are_killed_too(
    stage: Stage, recorder: Recorder, how: str
) -> None:
    """G1: a daemon with a session of its own, holding the output, is gone when stop() or kill() return."""
    running = await start(stage, recorder, LEAVES_A_DAEMON)
    assert stage.has_said("daemon")
    async with asyncio.timeout(8):
        await (running.stop("done") if how == "stop" else running.kill())
    assert stage.has_said("bye") == (how == "stop")
    assert_nothing_is_left(stage, recorder)


async def test_program_that_crashes(stage: Stage, recorder: Recorder) -> None:
    """``ended`` says how; several may wait, and one that gives up disturbs nobody."""
    running = await stage.backend(CRASHES).start(recorder.section)
    impatient = asyncio.ensure_future(running.ended)
    impatient.cancel()
    async with asyncio.timeout(10):
        assert "code 3" in await running.ended
    assert "code 3" in await running.ended
    assert running.status().state is ProgramState.ENDED
    assert recorder.resources, "registered until somebody has seen that nothing is left"
    await running.stop("it ended")
    assert_nothing_is_left(stage, recorder)


async def test_program_that_is_killed_from_outside(stage: Stage, recorder: Recorder) -> None:
    """Noticed, and told from an end in order."""
    running = await start(stage, recorder, SERVES)
    stage.crash()
    async with asyncio.timeout(10):
        how = await running.ended
    assert how
    assert "code 0" not in how
    await running.kill()
    assert_nothing_is_left(stage, recorder)


async def test_what_a_crashed_program_left_is_killed(stage: Stage, recorder: Recorder) -> None:
    """G1: a daemon outlives the program; stop() ends it, without waiting for stop_timeout."""
    running = await start(stage, recorder, LEAVES_A_DAEMON, stop_timeout=30)
    stage.crash()
    async with asyncio.timeout(10):
        await running.ended
    began = system.now()
    await running.stop("it ended")
    assert system.now() - began < 15
    assert_nothing_is_left(stage, recorder)


async def test_crash_loop(stage: Stage, recorder: Recorder) -> None:
    """A program that crashes again and again is started again and again, each time as if the first."""
    backend = stage.backend(Behaviour(ends_seconds=0.0, exit_code=1))
    for count in range(1, 6):
        running = await backend.start(recorder.section)
        async with asyncio.timeout(10):
            assert "code 1" in await running.ended
        await running.stop("it ended")
        assert_nothing_is_left(stage, recorder)
        assert recorder.count("unregister") == count
    assert len(recorder.all) in (1, 5)


# --- output


async def test_last_lines_are_kept(stage: Stage, recorder: Recorder) -> None:
    """logs() has the last lines that were printed, oldest first, also after the end."""
    backend = stage.backend(Behaviour(lines=("one", "two", "three"), ends_seconds=0.2))
    running = await backend.start(recorder.section)
    async with asyncio.timeout(10):
        await running.ended
    await running.stop("it ended")
    assert [line.split()[-1] for line in await backend.logs(stage.app, 2)] == ["two", "three"]


async def test_flood_of_output_holds_nobody_up(stage: Stage, recorder: Recorder) -> None:
    """A program that prints for ever: the loop turns on, only the last lines are kept, kill() is at once."""
    backend = stage.backend(Behaviour(floods=True))
    running = await backend.start(recorder.section)
    await until(lambda: stage.has_said("ready"))
    worst = 0.0
    for _ in range(100):
        began = system.now()
        await asyncio.sleep(0.01)
        worst = max(worst, system.now() - began - 0.01)
    assert worst < 1.0
    assert len(await backend.logs(stage.app, 10)) == 10
    began = system.now()
    await running.kill()
    assert system.now() - began < 15
    assert_nothing_is_left(stage, recorder)


# --- the life after


@pytest.mark.parametrize(
    ("stage", "registration"),
    [param(name, number) for name, count in REGISTRATIONS.items() for number in range(count + 1)],
    indirect=["stage"],
)
async def test_node_killed_while_starting_leaves_nothing_that_the_keeper_does_not_find(
    stage: Stage, recorder: Recorder, registration: int
) -> None:
    """G1: SIGKILL of the node in the middle of start(): its keeper ends whatever came of it."""
    known = await stage.node_dies(LEAVES_A_DAEMON, registration)
    assert [(resource.app, resource.epoch) for resource in known] == [(stage.app, 6)]
    assert await stage.keeper_kills(known)
    assert stage.left() == []
    if registration:
        assert not stage.has_said("started")


async def test_restarted_node_takes_up_what_runs(stage: Stage, recorder: Recorder) -> None:
    """The node was killed, the keeper let its program run (pause): adopt() has it as if started here."""
    (resource,) = await stage.node_dies(Behaviour(daemon=True, lines=("up",)), 0)
    await asyncio.sleep(0.1)
    backend = stage.backend(SERVES, ready=True)
    running = await backend.adopt(recorder.section_of(resource), resource)
    assert resource.adoptable
    assert running is not None
    await until(lambda: stage.has_said("ready"))
    await running.wait_ready()
    assert running.status().state is ProgramState.RUNNING
    assert not asyncio.ensure_future(running.ended).done()
    await running.stop("done")
    assert stage.has_said("bye")
    assert_nothing_is_left(stage, recorder)


async def test_adopted_program_that_ends_says_so(stage: Stage, recorder: Recorder) -> None:
    """The end of a program is noticed, whoever has started it."""
    (resource,) = await stage.node_dies(SERVES, 0)
    running = await stage.backend(SERVES).adopt(recorder.section_of(resource), resource)
    assert running is not None
    await until(lambda: stage.has_said("ready"))
    stage.crash()
    async with asyncio.timeout(10):
        assert await running.ended
    assert running.status().state is ProgramState.ENDED
    await running.stop("it ended")
    assert_nothing_is_left(stage, recorder)


async def test_there_is_nothing_to_adopt_of_what_has_ended(stage: Stage, recorder: Recorder) -> None:
    """It ended while nobody looked: None, or one that says how it ended; and the caller starts anew."""
    (resource,) = await stage.node_dies(SERVES, 0)
    assert await stage.keeper_kills([resource])
    ended = await stage.backend(SERVES).adopt(recorder.section_of(resource), resource)
    if ended is not None:
        assert ended.status().state is ProgramState.ENDED
        assert "SIGKILL" in await ended.ended
        await ended.stop("it ended")
    assert_nothing_is_left(stage, recorder)


@pytest.mark.parametrize("stage", [param(name) for name in FENCING], indirect=True)
async def test_fence_ends_what_a_dead_node_left(stage: Stage, recorder: Recorder) -> None:
    """G1: node and keeper are dead, and their list is lost: fence() finds what runs of the app, by itself."""
    await stage.node_dies(LEAVES_A_DAEMON, 0)
    await stage.lose()
    backend = stage.backend(SERVES)
    assert stage.left()
    assert await backend.fence(stage.app)
    assert stage.left() == []
    assert await backend.fence(stage.app) == []


@pytest.mark.parametrize("stage", [param(name) for name in FENCING], indirect=True)
async def test_start_ends_what_a_dead_node_left(stage: Stage, recorder: Recorder) -> None:
    """The same when the app is started again: never two of them."""
    await stage.node_dies(LEAVES_A_DAEMON, 0)
    await stage.lose()
    before = set(stage.left())
    running = await stage.backend(SERVES).start(recorder.section)
    assert not before & set(stage.left())
    await running.kill()
    assert_nothing_is_left(stage, recorder)


async def test_fence_leaves_alone_what_is_held(stage: Stage, recorder: Recorder) -> None:
    """What a living node runs is none of fence()'s business."""
    backend = stage.backend(SERVES)
    running = await backend.start(recorder.section)
    assert await backend.fence(stage.app) == []
    assert await backend.fence("other") == []
    await until(stage.left)  # a unit is there before its program is
    assert not asyncio.ensure_future(running.ended).done()
    await running.kill()
