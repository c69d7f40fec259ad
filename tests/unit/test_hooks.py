"""Hooks: one at a time, in order, each with its deadline (G7). In virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Generator

import pytest

from phalanx.config import HookTimeouts
from phalanx.errors import ConfigError, HookFailed
from phalanx.hooks import Hooks, HookStuck
from phalanx.testing.virtual_time import Run, virtual_time


@pytest.fixture
def run() -> Generator[Run]:
    with virtual_time() as running:
        yield running


def hooks(**timeouts: float) -> Hooks:
    return Hooks("wiki", HookTimeouts(**timeouts), lambda name, seconds: None)  # type: ignore[arg-type]


def test_g7_hooks_of_one_app_never_run_at_the_same_time(run: Run) -> None:
    """Five calls at once, of two hooks: they run one after the other, in the order of the calls."""
    running, most, order = 0, 0, list[str]()

    async def hook(name: str) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(1)
        order.append(name)
        running -= 1

    some = hooks()
    some.add("on_start", hook)
    some.add("on_leader_change", hook)

    async def all_at_once() -> None:
        names = ["on_start", "on_leader_change", "on_leader_change", "on_start", "on_leader_change"]
        await asyncio.gather(*(some.call(name, f"{name} {i}") for i, name in enumerate(names)))

    run(all_at_once())
    assert most == 1
    assert [int(name.split()[1]) for name in order] == [0, 1, 2, 3, 4]
    assert run.now() == pytest.approx(5, abs=0.1)


def test_g7_hook_that_overruns_is_cancelled_and_reported(run: Run) -> None:
    """After its deadline, and not before; its own clean-up runs."""
    cleaned = list[float]()

    async def hangs() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned.append(run.now())

    some = hooks(on_passive=7.0)
    some.add("on_passive", hangs)
    with pytest.raises(HookFailed, match="overran its deadline of 7 s"):
        run(some.call("on_passive", None))
    assert cleaned == [pytest.approx(7, abs=0.1)]


def test_g7_hook_that_ignores_its_cancellation_is_stuck(run: Run) -> None:
    """It is reported as stuck, and again until it has really ended."""

    async def deaf() -> None:
        end = asyncio.get_running_loop().time() + 20
        while asyncio.get_running_loop().time() < end:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                continue

    some = hooks(on_passive=5.0)
    some.add("on_passive", deaf)

    async def call() -> None:
        with pytest.raises(HookStuck):
            await some.call("on_passive", None)
        with pytest.raises(HookStuck):
            await some.end_left()
        await asyncio.sleep(30)
        await some.end_left()

    run(call())


def test_hook_that_raises_is_reported_with_its_cause(run: Run) -> None:
    """HookFailed names app, hook and error, and holds the exception."""

    def fails() -> None:
        raise ValueError("no such table")

    some = hooks()
    some.add("on_start", fails)
    with pytest.raises(HookFailed, match="app 'wiki': hook on_start failed: ValueError: no such table") as e:
        run(some.call("on_start", None))
    assert isinstance(e.value.__cause__, ValueError)


def test_synchronous_hook_runs_in_a_thread_of_its_own(run: Run) -> None:
    """It does not block the loop's thread, and all synchronous hooks of an app share one thread."""
    threads = list[str]()
    some = hooks()
    some.add("on_start", lambda: threads.append(threading.current_thread().name))
    some.add("on_stop", lambda ctx: threads.append(threading.current_thread().name))

    async def both() -> None:
        await some.call("on_start", "ctx")
        await some.call("on_stop", "ctx")

    run(both())
    some.close()
    assert threads[0] == threads[1] != threading.main_thread().name


def test_g1_thread_that_hangs_is_stuck_however_often_it_is_cancelled(run: Run) -> None:
    """A section's end cancels it again and again: it must not look ended while its thread goes on."""
    some, go_on = hooks(on_passive=1.0), threading.Event()
    some.add("on_passive", go_on.wait)

    async def call() -> None:
        with pytest.raises(HookStuck):
            await some.call("on_passive", None)
        for _ in range(3):
            with pytest.raises(HookStuck):
                await some.end_left()
            assert some.unfinished == ("on_passive",)
        go_on.set()
        while some.unfinished:  # noqa: ASYNC110 - a thread tells no event of the loop
            await asyncio.sleep(0.1)
        await some.end_left()

    try:
        run(call())
    finally:
        go_on.set()
        some.close()


def test_cancellation_is_not_lost_in_a_hook_that_is_stuck(run: Run) -> None:
    """Whoever is cancelled while it waits for the hook ends as cancelled; the hook stays on record."""
    some, go_on = hooks(on_start=100.0), False

    async def deaf() -> None:
        while not go_on:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1)

    some.add("on_start", deaf)

    async def cancel() -> None:
        nonlocal go_on
        caller = asyncio.create_task(some.call("on_start", None))
        await asyncio.sleep(1)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        with pytest.raises(HookStuck):
            await some.end_left()
        assert some.unfinished == ("on_start",)
        go_on = True
        await asyncio.sleep(2)
        await some.end_left()
        assert some.unfinished == ()

    run(cancel())


@pytest.mark.parametrize("bad", [lambda a, b: None, lambda *, key: None, "not callable"])
def test_wrong_hook_is_refused_at_once(bad: object) -> None:
    """A hook takes one argument or none."""
    with pytest.raises(ConfigError, match=r"apps\.wiki\.on_start"):
        hooks().add("on_start", bad)  # type: ignore[arg-type]


def test_second_hook_of_one_kind_is_refused() -> None:
    """Silently replacing the first would lose it."""
    some = hooks()
    some.add("on_start", lambda: None)
    with pytest.raises(ConfigError, match="already"):
        some.add("on_start", lambda: None)
