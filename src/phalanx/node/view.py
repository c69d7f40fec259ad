"""What a node shows of itself: over HTTP, over NATS, and to the program that it runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from phalanx import system
from phalanx.app import NodeApp
from phalanx.bus.connection import NatsBus
from phalanx.config import PlatformConfig
from phalanx.coord.membership import PlatformState
from phalanx.coord.register import Register
from phalanx.coord.session import Session
from phalanx.node.sessions import Sessions
from phalanx.node.stopping import Stopping
from phalanx.observe.metrics import Metrics
from phalanx.types import Member, NodeStatus, Role
from phalanx.version import VERSION


class View:
    """See :class:`phalanx.observe.http.NodeView`. Looking changes nothing."""

    def __init__(
        self,
        config: PlatformConfig,
        apps: Mapping[str, NodeApp],
        problems: Mapping[str, str],
        *,
        bus: NatsBus,
        sessions: Callable[[], Sessions | None],
        state: PlatformState,
        register: Register,
        stopping: Stopping,
        metrics: Metrics,
    ) -> None:
        self._config, self._apps, self._problems = config, apps, problems
        self._bus, self._sessions, self._state, self._register = bus, sessions, state, register
        self._stopping, self._metrics = stopping, metrics

    @property
    def _session(self) -> Session | None:
        sessions = self._sessions()
        return sessions.current if sessions is not None else None

    def status(self) -> NodeStatus:
        """This node's view of itself."""
        session = self._session
        ready, _ = self.ready()
        return NodeStatus(
            self._config.name,
            self._config.node,
            VERSION,
            str(session.id) if session is not None else "",
            max(0.0, session.valid_until - system.now()) if session is not None and session.is_valid else 0.0,
            ready,
            self._bus.is_connected,
            self._bus.server_name,
            tuple(app.status() for app in self._apps.values()),
            dict(self._config.labels),
            (*self._problems.values(), *self._database_problems()),
        )

    def _database_problems(self) -> Iterator[str]:
        for app in self._apps.values():
            if app.database is not None and (problem := app.database.brief().problem):
                yield f"app {app.name}: {problem}"

    def live_members(self) -> dict[str, Member]:
        """The members whose session is not over."""
        members = self._state.members.items()
        return {node: member for node, member in members if not self._register.is_over(member.session)}

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self._metrics.render(self.status())

    def live(self) -> tuple[bool, str]:
        """Whether the process works at all."""
        return True, "the event loop runs"

    def ready(self) -> tuple[bool, str]:
        """Whether this node takes part: it has a session, a connection, and no app that is barred."""
        sessions, session = self._sessions(), self._session
        if sessions is None or session is None or not session.is_valid or not sessions.is_serving:
            return False, "no session"
        if not self._bus.is_connected:
            return False, "no connection to NATS"
        if self._stopping.is_asked:
            return False, "stopping"
        for app in self._apps.values():
            if app.role in (Role.STARTING, Role.INELIGIBLE, Role.STOPPED):
                return False, f"app {app.name} is {app.role}: {app.status().reason}"
        return True, "takes part"


__all__ = ["View"]
