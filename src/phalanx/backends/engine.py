"""The Docker Engine's API, as the container backend uses it: deadlines, and one type of error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from typing import Any, TypeVar

import aiodocker
import aiohttp
import msgspec
from aiodocker.exceptions import DockerError
from aiodocker.multiplexed import multiplexed_result_stream  # pyright: ignore

T = TypeVar("T")

REQUEST_SECONDS = 5.0
CREATE_SECONDS = 30.0
"""Making and starting take longer: layers are mounted, networks set up, and the disk may be busy."""


class HealthRun(msgspec.Struct, frozen=True, rename="pascal"):
    """One run of a HEALTHCHECK."""

    output: str = ""


class Health(msgspec.Struct, frozen=True, rename="pascal"):
    """``status``: ``starting``, ``healthy``, ``unhealthy``, ``none``. ``log``: its last runs."""

    status: str = ""
    log: tuple[HealthRun, ...] | None = None


class State(msgspec.Struct, frozen=True, rename="pascal"):
    """What a container does. ``pid``: its first process, as the engine sees it; 0 if it does not run."""

    running: bool = False
    paused: bool = False
    restarting: bool = False
    oom_killed: bool = msgspec.field(name="OOMKilled", default=False)
    pid: int = 0
    exit_code: int = 0
    error: str = ""
    started_at: str = ""
    health: Health | None = None

    @property
    def runs(self) -> bool:
        """Whether it has processes, or could get some without being asked."""
        return self.running or self.paused or self.restarting

    @property
    def health_status(self) -> str:
        """Empty for a container without a HEALTHCHECK."""
        return self.health.status if self.health is not None and self.health.status != "none" else ""


class RestartPolicy(msgspec.Struct, frozen=True, rename="pascal"):
    """``name``: ``no`` or empty for none."""

    name: str = ""


class PortBinding(msgspec.Struct, frozen=True, rename="pascal"):
    """A port of the host; ``host_port`` is empty for any."""

    host_ip: str = ""
    host_port: str = ""


class HostConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """How a container is to be run. ``port_bindings`` by port of the container, ``80/tcp``."""

    restart_policy: RestartPolicy | None = None
    auto_remove: bool = False
    port_bindings: dict[str, tuple[PortBinding, ...] | None] | None = None


class ContainerConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """``stop_signal``: a whole name or a number; empty for SIGTERM."""

    stop_signal: str = ""


class Inspection(msgspec.Struct, frozen=True, rename="pascal"):
    """What the engine says of a container (Engine API, ContainerInspect)."""

    id: str
    name: str
    state: State
    config: ContainerConfig
    host_config: HostConfig


class PublicPort(msgspec.Struct, frozen=True, rename="pascal"):
    """A port of a running container; ``public_port`` 0: not published."""

    public_port: int = 0


class Summary(msgspec.Struct, frozen=True, rename="pascal"):
    """A container in a list (Engine API, ContainerList)."""

    id: str
    labels: dict[str, str] | None = None
    ports: tuple[PublicPort, ...] | None = None


class _Network(msgspec.Struct, frozen=True, rename="pascal"):
    id: str
    name: str


class EngineError(Exception):
    """The engine refused a request (``status``: HTTP), or did not answer it (0: the outcome is unknown)."""

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(message)


class Engine:
    """A client of the engine behind one socket, for one event loop; :meth:`close` it."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        # Typed by hand: much of aiodocker is declared as "anything".
        self._docker: Any = aiodocker.Docker(url=f"unix://{socket}")

    async def close(self) -> None:
        """Drop its connections. Twice is harmless."""
        await self._docker.close()

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- looking

    async def version(self) -> str:
        """The engine's version: that it answers."""
        return str((await _ask(self._docker.version()))["Version"])

    async def has_image(self, name: str) -> bool:
        """Whether the image is on this host."""
        return await _unless_missing(_ask(self._docker.images.inspect(name))) is not None

    async def has_network(self, name: str) -> bool:
        """Whether there is a network of that name or id."""
        found = await _ask(self._docker.networks.list(filters={"name": [name]}))
        return any(name in (one.name, one.id) for one in _as(tuple[_Network, ...], found))

    async def inspect(self, container: str) -> Inspection | None:
        """A container by id or name; None if there is none."""
        found = await _unless_missing(_ask(self._docker.containers.container(container).show()))
        return None if found is None else _as(Inspection, found)

    async def labelled(self, labels: Mapping[str, str]) -> list[str]:
        """The ids of all containers with these labels, running or not, the newest first."""
        wanted = json.dumps({"label": [f"{key}={value}" for key, value in labels.items()]})
        return [one.id for one in await self._list(all=True, filters=wanted)]

    async def running(self) -> Sequence[Summary]:
        """All containers that run on this engine."""
        return await self._list()

    async def _list(self, **query: object) -> Sequence[Summary]:
        found = await _ask(self._docker.containers.list(**query))
        return _as(tuple[Summary, ...], [one._container for one in found])

    # --- acting

    async def create(self, name: str, body: Mapping[str, Any]) -> str:
        """Make a container, which does not run; its id."""
        made = await _ask(self._docker.containers.create(body, name=name), CREATE_SECONDS)
        return str(made.id)

    async def start(self, container: str) -> None:
        """Start it. With status 0 it may yet start."""
        await _ask(self._docker.containers.container(container).start(), CREATE_SECONDS)

    async def signal(self, container: str, name: str) -> None:
        """Send its first process a signal, by its whole name."""
        await _ask(self._docker.containers.container(container).kill(signal=name))

    # --- following

    async def wait(self, container: str) -> int:
        """Wait until it does not run; its exit code. The caller sets the deadline."""
        ended = await _ask(self._docker.containers.container(container).wait(), None)
        return int(ended["StatusCode"])

    async def health(self, container: str, since: float) -> AsyncGenerator[str]:
        """Each change of its health from Unix time *since* on: ``healthy``, ``unhealthy``, ``starting``.

        Ends when the engine does.
        """
        events = self._docker.events
        changes = events.subscribe(create_task=False)
        filters = json.dumps({"container": [container], "event": ["health_status"]})
        running = asyncio.create_task(events.run(since=int(since), filters=filters), name="health events")
        try:
            while (event := await changes.get()) is not None:
                yield str(event.get("Action", "")).partition(":")[2].strip()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def output(self, container: str, **options: object) -> AsyncGenerator[str]:
        """What it writes, in pieces that may end anywhere, until it ends. Raises EngineError."""
        found = await _ask(self._docker.containers.container(container).show())
        query = {"stdout": True, "stderr": True, "follow": True, **options}
        endless = aiohttp.ClientTimeout()
        try:
            # Not container.log(): what it opens stays open when it is given up.
            async with self._docker._query(
                f"containers/{container}/logs", params=query, timeout=endless
            ) as got:
                try:
                    async for piece in multiplexed_result_stream(got, is_tty=bool(found["Config"]["Tty"])):
                        yield piece
                finally:
                    got.close()
        except (DockerError, aiohttp.ClientError, OSError) as error:
            raise _translated(error) from error

    async def tail(self, container: str, lines: int, **options: object) -> list[str]:
        """The last *lines* that it wrote, oldest first."""
        log = self._docker.containers.container(container).log(
            stdout=True, stderr=True, tail=lines, **options
        )
        return "".join(await _ask(log)).splitlines()


async def _ask(request: Awaitable[Any], seconds: float | None = REQUEST_SECONDS) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await request
    except TimeoutError:
        raise EngineError(0, f"no answer within {seconds:g} s") from None
    except (DockerError, aiohttp.ClientError, OSError, ValueError, KeyError) as error:
        raise _translated(error) from error


def _translated(error: Exception) -> EngineError:
    if isinstance(error, DockerError) and error.status < 900:  # aiodocker's own numbers: no connection
        return EngineError(int(error.status), str(error.message))
    return EngineError(0, str(error) or type(error).__name__)


def _as(kind: type[T], found: object) -> T:
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        raise EngineError(0, f"an answer that makes no sense: {error}") from error


async def _unless_missing(request: Awaitable[Any]) -> Any:
    try:
        return await request
    except EngineError as error:
        if error.status == 404:
            return None
        raise
