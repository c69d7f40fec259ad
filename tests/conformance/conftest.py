"""What the conformance suite of backends needs: each backend under test, and a section that records.

A new backend is one more entry in ``BACKENDS``: how it makes a backend that runs a given program.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from phalanx import config, system
from phalanx.backends import make_backend
from phalanx.ports import Backend, SectionContext
from phalanx.types import Resource


def process(code: str, **options: object) -> Backend:
    """Python *code* as a process."""
    declared = config.build_app(
        "wiki", config.ActivePassive(), backend=config.Process([sys.executable, "-uc", code], **options)
    ).backend
    assert declared is not None
    return make_backend(declared)


BACKENDS: dict[str, Callable[..., Backend]] = {"process": process}


class Recorder:
    """A keeper that writes down what it is told, and can refuse or hang at the nth registration."""

    def __init__(self, epoch: int) -> None:
        self.calls: list[tuple[str, str]] = []
        self.resources: dict[str, Resource] = {}
        self.markers: set[str] = set()
        self.on_register: dict[int, Callable[[Resource], object]] = {}
        self.section = SectionContext("prod", "n1", "wiki", epoch, self._register, self._unregister)

    async def _register(self, resource: Resource) -> None:
        number = sum(kind == "register" for kind, _ in self.calls) + 1
        self.calls.append(("register", resource.id))
        self.resources[resource.id] = resource
        self.markers.add(resource.id)
        if act := self.on_register.get(number):
            result = act(resource)
            if asyncio.iscoroutine(result):
                await result
        await asyncio.sleep(0)

    def _unregister(self, resource_id: str) -> None:
        self.calls.append(("unregister", resource_id))
        self.resources.pop(resource_id, None)

    def left(self) -> list[int]:
        """The processes that still run of all that was ever registered."""
        return [pid for marker in self.markers for pid in system.find_marked(marker)]


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Callable[..., Backend]:
    """Makes a backend that runs Python code."""
    return BACKENDS[request.param]


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    """A section that records; nothing of it outlives the test."""
    made = Recorder(epoch=7)
    yield made
    for marker in made.markers:
        system.kill_marked(marker)


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until *condition* holds, or fail."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def text(path: Path) -> str:
    """What is in *path*, nothing if it is not there (yet)."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    return ""
