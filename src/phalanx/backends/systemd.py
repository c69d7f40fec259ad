"""A systemd unit as backend, over D-Bus."""

from __future__ import annotations

from phalanx.config import Systemd
from phalanx.errors import BackendError
from phalanx.ports import Running, SectionContext
from phalanx.types import Resource


class SystemdBackend:
    """Implements ``ports.Backend`` for :class:`phalanx.config.Systemd`."""

    def __init__(self, config: Systemd) -> None:
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
