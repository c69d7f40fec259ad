"""A Docker container as backend, by the Engine API: made from an image at each start, or an existing one.

A container that we make carries labels that say whose it is, so that what an earlier life of this node left
can be told from what other nodes and platforms run on the same engine. None has a restart policy: the engine
would start it again behind our back.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Sequence
from functools import partial

from phalanx import child, containers
from phalanx.backends import container_plan
from phalanx.backends.container import Container
from phalanx.backends.engine import Engine, EngineError, State
from phalanx.config import Docker
from phalanx.errors import BackendError
from phalanx.ports import Running, SectionContext
from phalanx.types import Resource

log = logging.getLogger("phalanx.backend")

LINES_KEPT = 1000
"""How many of the last lines of its containers a backend knows, when the engine has them no more."""


class DockerBackend:
    """Implements ``ports.Backend`` for :class:`phalanx.config.Docker`.

    *platform*, *node*: whose containers the labels name.
    """

    def __init__(self, config: Docker, platform: str, node: str) -> None:
        self._config, self._platform, self._node = config, platform, node
        self._held: set[str] = set()
        """The ids of the containers that a section of this node has."""
        self._kept: deque[str] = deque(maxlen=LINES_KEPT)

    async def prepare(self, app: str) -> None:
        """See ``ports.Backend.prepare``."""
        await container_plan.check(self._config, app, self._owner(app))

    async def start(self, section: SectionContext) -> Running:
        """Make, register, start, register with its process. See ``ports.Backend.start``.

        On a failure or cancellation it returns only when nothing of it runs, however long that takes.
        """
        await self.fence(section.app)
        engine = Engine(self._config.socket)
        making = asyncio.create_task(self._make(engine, section), name=f"{section.app} backend, making")
        try:
            # To its end even if cancelled: what is made has to be known, to be removed.
            container, name = await child.finish(making)
        except BaseException:
            if making.done() and not making.cancelled() and making.exception() is None:
                await child.finish(
                    asyncio.create_task(self._run(engine, section, *making.result()).abandon())
                )
            await engine.close()
            raise
        run = self._run(engine, section, container, name)
        try:
            await run.start()
        except BaseException:
            await child.finish(asyncio.create_task(run.abandon(), name=f"{section.app} backend, giving up"))
            raise
        return run

    def _run(self, engine: Engine, section: SectionContext, container: str, name: str) -> Container:
        return self._hold(engine, section, container, name, remove=bool(self._config.image))

    def _hold(
        self, engine: Engine, section: SectionContext, container: str, name: str, *, remove: bool
    ) -> Container:
        self._held.add(container)
        return Container(
            engine,
            self._config,
            section,
            container,
            name,
            remove=remove,
            keep=self._kept.append,
            on_gone=self._held.discard,
        )

    async def _make(self, engine: Engine, section: SectionContext) -> tuple[str, str]:
        """The id and name of the container to start."""
        app = section.app
        try:
            if self._config.container:
                found = await container_plan.existing(engine, self._config.container, app)
                return found.id, self._config.container
            token = secrets.token_hex(8)
            name = f"phalanx-{app}-{section.epoch}-{token[:6]}"
            labels = self._owner(app) | {
                container_plan.EPOCH: str(section.epoch),
                container_plan.RUN: token,
            }
            body = container_plan.body(self._config, section, labels)
            return await engine.create(name, body), name
        except EngineError as error:
            raise container_plan.cannot_make(app, self._config, error) from error

    def _owner(self, app: str) -> dict[str, str]:
        return container_plan.owner(self._platform, self._node, app)

    async def fence(self, app: str) -> list[str]:
        """See ``ports.Backend.fence``: by labels; an existing container whenever it runs."""
        async with Engine(self._config.socket) as engine:
            try:
                found = await self._left(engine, app)
            except EngineError as error:
                raise BackendError(
                    app, "kill", f"the Docker Engine does not tell what runs: {error}", "look at it"
                ) from error
        ended: list[str] = []
        for target, name in found:
            # To its end: half a kill is none.
            kill = child.in_thread(partial(containers.end, target))
            report = await child.finish(kill)
            if not report.gone:
                problem = f"container {name}, left by an earlier life, does not end: {report.problem}"
                raise BackendError(app, "kill", problem, f"docker rm -f {name}")
            log.warning("app %s: ended container %s of an earlier life", app, name)
            ended.append(f"container {name}")
        return ended

    async def _left(self, engine: Engine, app: str) -> list[tuple[containers.Target, str]]:
        left: list[tuple[containers.Target, str]] = []
        for ref in await self._containers(engine, app):
            found = await engine.inspect(ref)
            if found is None or found.id in self._held:
                continue
            if self._config.container and not found.state.runs:
                continue
            target = containers.Target(engine.socket, found.id, remove=bool(self._config.image))
            left.append((_with_process(target, found.state), found.name.lstrip("/")))
        return left

    async def adopt(self, section: SectionContext, resource: Resource) -> Running | None:
        """See ``ports.Backend.adopt``."""
        target = containers.Target.of(resource)
        engine = Engine(target.socket)
        name = resource.details.get("name", "")
        run = self._hold(engine, section, target.id, name, remove=target.remove)
        return run if await run.adopt(target) else None

    async def logs(self, app: str, lines: int = 100) -> list[str]:
        """See ``ports.Backend.logs``: of its present container, else what this life of the node has seen."""
        async with Engine(self._config.socket) as engine:
            try:
                found = await self._containers(engine, app)
                if found:
                    return await engine.tail(found[0], lines)
            except EngineError as error:
                if error.status != 404 and not self._kept:
                    raise BackendError(app, "logs", f"the Docker Engine does not tell: {error}") from error
        return list(self._kept)[-lines:]

    async def _containers(self, engine: Engine, app: str) -> Sequence[str]:
        if self._config.container:
            return [self._config.container]
        return await engine.labelled(self._owner(app))


def _with_process(target: containers.Target, state: State) -> containers.Target:
    """With its first process, if this host sees it: then it can be ended although the engine hangs."""
    pid = state.pid
    seen = {one.pid: one for one in containers.find(target.id)} if pid > 0 else {}
    return target._replace(pid=pid, start_time=seen[pid].start_time) if pid in seen else target
