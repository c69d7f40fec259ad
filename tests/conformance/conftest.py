"""What the conformance suite of backends needs: each stage in turn, and a section that records."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from phalanx.ports import SectionContext
from phalanx.types import Resource

from . import docker_stage
from .stages import BACKENDS, Stage, param


class Recorder:
    """A keeper that writes down what it is told, and can refuse or hang at the nth registration."""

    def __init__(self, app: str, epoch: int) -> None:
        self.calls: list[tuple[str, str]] = []
        self.resources: dict[str, Resource] = {}
        self.all: dict[str, Resource] = {}
        """Whatever was ever registered."""
        self.on_register: dict[int, Callable[[Resource], object]] = {}
        self.section = SectionContext("prod", "n1", app, epoch, self._register, self._unregister)

    def section_of(self, resource: Resource) -> SectionContext:
        """The section that *resource* is of, gone on with."""
        return msgspec.structs.replace(self.section, epoch=resource.epoch)

    def count(self, call: str) -> int:
        """How many calls there were of that kind."""
        return sum(kind == call for kind, _ in self.calls)

    async def _register(self, resource: Resource) -> None:
        number = self.count("register") + 1
        self.calls.append(("register", resource.id))
        self.resources[resource.id] = self.all[resource.id] = resource
        if act := self.on_register.get(number):
            result = act(resource)
            if asyncio.iscoroutine(result):
                await result
        await asyncio.sleep(0)

    def _unregister(self, resource_id: str) -> None:
        self.calls.append(("unregister", resource_id))
        self.resources.pop(resource_id, None)


@pytest.fixture(params=[param(name) for name in BACKENDS])
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    """One backend under test; nothing of it outlives the test."""
    if request.param == "docker":
        dockerd = request.getfixturevalue("dockerd")
        dockerd.empty_image()
        os.environ[docker_stage.SOCKET] = dockerd.socket
    made = BACKENDS[request.param](tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def recorder(stage: Stage) -> AsyncIterator[Recorder]:
    """A section that records; what it knew is ended with the test."""
    made = Recorder(stage.app, epoch=7)
    yield made
    await stage.keeper_kills(list(made.all.values()))
