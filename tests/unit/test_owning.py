"""The hooks of a ring's partitions: side by side, bounded, never two at once for one partition."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from phalanx.app.owning import PartitionContext, PartitionHook, PartitionHooks, Presence
from phalanx.decide.backoff import Backoff
from phalanx.errors import BackendError
from phalanx.ports import Fence
from phalanx.testing.virtual_time import virtual_time


class Stage:
    """Hooks that note what they do, and a ring that notes what it is told."""

    def __init__(
        self,
        *,
        own: Callable[[int], Awaitable[None]] | None = None,
        release: Callable[[int], Awaitable[None]] | None = None,
        most_at_once: int = 4,
        presence: Presence | None = None,
    ) -> None:
        self.lines: list[str] = []
        self.failed: list[str] = []
        self.epochs: list[int] = []
        self.running: dict[int, str] = {}
        self.most = 0
        self.hooks = PartitionHooks(
            "sessions",
            "n1",
            self,
            on_own=self._noting("own", own),
            on_release=self._noting("release", release),
            own_seconds=5.0,
            release_seconds=2.0,
            most_at_once=most_at_once,
            retry=Backoff(first=1.0, longest=4.0),
            presence=presence,
            on_failed=lambda partition, error: self.failed.append(str(error)),
        )

    def _noting(self, name: str, work: Callable[[int], Awaitable[None]] | None) -> PartitionHook:
        async def hook(partition: int, ctx: PartitionContext) -> None:
            assert partition not in self.running, "two hooks of one partition at once"
            self.running[partition] = name
            self.most = max(self.most, len(self.running))
            self.epochs.append(ctx.epoch)
            self.lines.append(f"{name} {partition}")
            try:
                if work is not None:
                    await work(partition)
            finally:
                del self.running[partition]

        return hook

    def ended(self, partition: int) -> None:
        """As the ring."""
        assert partition not in self.running
        self.lines.append(f"ended {partition}")

    def set_aside(self, partition: int, aside: bool) -> None:
        """As the ring."""
        self.lines.append(f"{'aside' if aside else 'again'} {partition}")

    def begin(self, *partitions: int) -> None:
        """Own them at epochs of ten times their numbers."""
        for partition in partitions:
            self.hooks.begin(partition, Fence("subject", partition * 10))


def test_g7_own_then_release_then_the_partition_is_given_back() -> None:
    """In this order, with the partition's epoch; ready only between the two."""

    async def play(stage: Stage) -> None:
        stage.begin(7)
        await asyncio.sleep(0.1)
        assert stage.hooks.ready == [7]
        stage.hooks.end(7, "the plan gives it to n2", False)
        assert stage.hooks.ready == []
        await asyncio.sleep(0.1)

    with virtual_time(threads=False) as run:
        stage = Stage()
        run(play(stage))
    assert stage.lines == ["own 7", "release 7", "ended 7"]
    assert stage.epochs == [70, 70]


def test_g7_hooks_run_side_by_side_up_to_their_bound() -> None:
    """Ten partitions, four at a time: three turns of a second."""

    async def play(stage: Stage) -> None:
        stage.begin(*range(10))
        await asyncio.sleep(2.5)
        assert len(stage.hooks.ready) == 8
        await asyncio.sleep(1)
        assert len(stage.hooks.ready) == 10
        await stage.hooks.close()

    with virtual_time(threads=False) as run:
        stage = Stage(own=lambda partition: asyncio.sleep(1))
        run(play(stage))
    assert stage.most == 4


def test_partition_that_ends_while_it_waits_for_its_turn_never_begins() -> None:
    """Nothing of it has run, so there is nothing to release: it is given back at once."""

    async def play(stage: Stage) -> None:
        stage.begin(1, 2)
        await asyncio.sleep(0.1)
        stage.hooks.end(2, "the plan gives it to n2", False)
        await asyncio.sleep(0.1)
        assert stage.lines == ["own 1", "ended 2"]
        await stage.hooks.close()

    with virtual_time(threads=False) as run:
        stage = Stage(own=lambda partition: asyncio.sleep(1), most_at_once=1)
        run(play(stage))


def test_own_that_fails_or_overruns_steps_aside_for_a_while_that_grows() -> None:
    """Reported; the ring is told to leave the partition alone, and when it may try again."""

    async def fail(partition: int) -> None:
        if partition == 1:
            raise ValueError("no room")
        await asyncio.sleep(60)

    async def play(stage: Stage) -> None:
        stage.begin(1, 2)
        await asyncio.sleep(5.5)
        assert stage.lines == ["own 1", "own 2", "aside 1", "again 1", "aside 2"]
        for partition in (1, 2):
            stage.hooks.end(partition, "it has failed here", False)
        await asyncio.sleep(0.1)
        stage.begin(1)
        await asyncio.sleep(1.5)
        assert "again 1" not in stage.lines[stage.lines.index("ended 1") :]
        await asyncio.sleep(1)
        assert stage.lines[-1] == "again 1"
        await stage.hooks.close()

    with virtual_time(threads=False) as run:
        stage = Stage(own=fail)
        run(play(stage))
    assert "of partition 1 failed: ValueError: no room" in stage.failed[0]
    assert "of partition 2 overran its deadline of 5 s" in stage.failed[1]


def test_hard_end_cancels_and_runs_no_release() -> None:
    """Whether on_own or on_release is under way."""

    async def play(stage: Stage) -> None:
        stage.begin(1, 2)
        await asyncio.sleep(0.1)
        stage.hooks.end(1, "the session is lost", True)
        stage.hooks.end(2, "the plan gives it away", False)
        await asyncio.sleep(0.1)
        assert stage.lines == ["own 1", "own 2", "ended 1", "release 2"]
        stage.hooks.end(2, "the session is lost", True)
        await asyncio.sleep(0.1)
        assert stage.lines[-1] == "ended 2"

    with virtual_time(threads=False) as run:
        stage = Stage(own=lambda partition: asyncio.sleep(1), release=lambda partition: asyncio.sleep(1))
        run(play(stage))
    assert stage.failed == []


def test_g6_partition_is_not_given_back_while_a_hook_of_it_goes_on() -> None:
    """One that ignores its cancellation is reported, and holds its partition until it ends."""

    async def deaf(partition: int) -> None:
        for _ in range(4):
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                continue

    async def play(stage: Stage) -> None:
        stage.begin(1)
        await asyncio.sleep(0.1)
        stage.hooks.end(1, "the session is lost", True)
        await asyncio.sleep(2.5)
        assert stage.lines == ["own 1"]
        await asyncio.sleep(60)
        assert stage.lines == ["own 1", "ended 1"]

    with virtual_time(threads=False) as run:
        stage = Stage(own=deaf)
        run(play(stage))
    assert "does not end, 1 s after it was cancelled" in stage.failed[0]


class _FullDisk:
    """The keeper's side: it cannot take note of anything."""

    async def enter(self) -> None:
        """As a presence."""
        raise BackendError("sessions", "start", "the keeper cannot take note of it: no space left")

    def leave(self) -> None:
        """Never: nothing has entered."""
        raise AssertionError


def test_partition_that_the_keeper_cannot_take_note_of_goes_to_another_node() -> None:
    """It does not stay here unserved, nor keep the node from ending: it steps aside, and is given back."""

    async def play(stage: Stage) -> None:
        stage.begin(1)
        await asyncio.sleep(0.1)
        assert stage.lines == ["aside 1"]
        stage.hooks.end(1, "it has failed here", False)
        await asyncio.sleep(0.1)
        assert stage.lines == ["aside 1", "ended 1"]
        assert stage.hooks.is_empty
        await stage.hooks.close()

    with virtual_time(threads=False) as run:
        stage = Stage(presence=_FullDisk())
        run(play(stage))
    assert "no space left" in stage.failed[0]
