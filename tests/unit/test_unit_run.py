"""A started systemd unit, without a systemd: what happens when it can't be asked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from phalanx import config, units
from phalanx.backends.systemd_manager import Service, Unit
from phalanx.backends.systemd_run import UnitRun
from phalanx.errors import BackendError
from phalanx.ports import SectionContext
from phalanx.types import Resource

UNIT = Unit(
    "wiki.service", "loaded", ("", ""), "active", "running", "static",
    True, True, False, (0, "/"), [], 1, b"\1" * 16,
)  # fmt: skip
SERVICE = Service("simple", "no", ([], []), False, "system.slice", "/wiki", [], "success", 0, 0, 1)


class Manager:
    """Answers after its library has failed once."""

    def __init__(self) -> None:
        self.asked = 0

    async def watch(self, *_: object) -> None:
        """Nobody tells of changes."""

    async def read(self, path: str) -> tuple[Unit, Service]:
        """See ``Manager.read``."""
        self.asked += 1
        if self.asked == 1:
            raise ValueError("a message that makes no sense")
        return UNIT, SERVICE

    async def close(self) -> None:
        """Nothing is open."""


@pytest.fixture(autouse=True)
def permits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to a folder of the test's own."""
    monkeypatch.setattr(units, "PERMITS", tmp_path)


def unit_run(manager: object, **options: Any) -> UnitRun:
    """The unit, declared with *options*, under that manager."""

    async def register(resource: Resource) -> None:
        pass

    section = SectionContext("prod", "n1", "wiki", 7, register, lambda one: None)
    resource = Resource("unit", "wiki.7.x", "wiki", 7, details={"unit": UNIT.id, "cgroup": "/wiki"})
    declared = config.Systemd(unit=UNIT.id, **options)
    return UnitRun(declared, section, cast("Any", manager), "/wiki", (UNIT, SERVICE), resource)


async def test_a_failure_of_the_bus_library_does_not_end_following(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged, and the unit is read again: else its end would never be seen."""
    manager = Manager()
    run = unit_run(manager)
    async with asyncio.timeout(5):
        await run.take_up()
    assert manager.asked == 2
    assert "cannot be read" in caplog.text
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


class Hasty:
    """Tells of the end of a job before the unit's state shows what came of it."""

    def __init__(self) -> None:
        self.asked = 0
        self._tell: Any = None

    async def watch(self, name: str, path: str, stale: object, on_result: object) -> None:
        """Remember whom to tell."""
        self._tell = on_result

    async def call(self, member: str, *_: object) -> list[str]:
        """A job is made of a start."""
        return ["/job/5"] if member == "StartUnit" else []

    async def read(self, path: str) -> tuple[Unit, Service]:
        """The first answer is older than the job's end, which is told at the same moment."""
        self.asked += 1
        if self.asked == 1:
            self._tell("/job/5", "done")
            return msgspec.structs.replace(UNIT, job=(5, "/job/5")), SERVICE
        return msgspec.structs.replace(UNIT, invocation_id=b"\2" * 16), SERVICE

    async def close(self) -> None:
        """Nothing is open."""


async def test_job_that_is_over_before_its_unit_was_read_again_has_started_it() -> None:
    """Its state is asked for once more, rather than taken for a start that came to nothing."""
    manager = Hasty()
    run = unit_run(manager)
    async with asyncio.timeout(5):
        await run.start()
    assert manager.asked == 2
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


async def test_unit_that_systemd_does_not_tell_of_is_not_taken_up() -> None:
    """A systemd that fell silent holds no activation up for ever: it fails by ready_timeout."""

    class Silent(Manager):
        async def read(self, path: str) -> tuple[Unit, Service]:
            """It never answers."""
            await asyncio.Event().wait()
            raise AssertionError

    run = unit_run(Silent(), ready_timeout=0.1)
    with pytest.raises(BackendError, match="did not tell of wiki"):
        async with asyncio.timeout(5):
            await run.take_up()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
