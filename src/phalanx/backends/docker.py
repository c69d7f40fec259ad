"""A Docker container as backend, by the Engine API."""

from __future__ import annotations

from phalanx.config import Docker
from phalanx.errors import BackendError
from phalanx.ports import Running, SectionContext
from phalanx.types import Resource


class DockerBackend:
    """Implements ``ports.Backend`` for :class:`phalanx.config.Docker`."""

    def __init__(self, config: Docker) -> None:
        self._config = config

    async def prepare(self, app: str) -> None:
        """See ``ports.Backend.prepare``."""
        raise BackendError(app, "prepare", "not built yet")

    async def start(self, section: SectionContext) -> Running:
        """See ``ports.Backend.start``."""
        raise BackendError(section.app, "start", "not built yet")

    async def fence(self, app: str) -> list[str]:
        """See ``ports.Backend.fence``."""
        raise BackendError(app, "kill", "not built yet")

    async def adopt(self, section: SectionContext, resource: Resource) -> Running | None:
        """See ``ports.Backend.adopt``."""
        raise BackendError(section.app, "start", "not built yet")

    async def logs(self, app: str, lines: int = 100) -> list[str]:
        """See ``ports.Backend.logs``."""
        raise BackendError(app, "logs", "not built yet")
