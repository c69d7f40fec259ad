"""What does not change hands although the node ends: in a pause its keeper goes on with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from phalanx.app import NodeApp
from phalanx.coord.session import Session
from phalanx.keeper import wire
from phalanx.node.stopping import Stopping


class Keeping:
    """Which apps are kept. ``session``: the present one, whose keeper is told; ``owns_process``: whether the
    process ends with the node, as only then can anything be left to the keeper."""

    def __init__(self, apps: Mapping[str, NodeApp], stopping: Stopping) -> None:
        self._apps, self._stopping = apps, stopping
        self.owns_process = False
        self.session: Session | None = None
        self.kept: set[str] = set()
        """Those that were asked about when the node had to stop."""
        self._told = wire.Keep(())

    def begin(self, session: Session) -> None:
        """A new session: its keeper was told of nothing yet."""
        self.session, self._told = session, wire.Keep(())

    def keeps(self, app: NodeApp) -> bool:
        """Whether *app* does not change hands although the node stops now; asked once, and remembered."""
        session = self.session
        able = (
            self.owns_process and not self._stopping.in_a_hurry and session is not None and session.is_valid
        )
        if able and app.stays_in_pause and app.is_paused and app.has_section:
            self.kept.add(app.name)
        return app.name in self.kept

    def _keep_of(self, kept: Iterable[str]) -> wire.Keep:
        apps = tuple(sorted(kept))
        return wire.Keep(apps, tuple(name for name in self._apps if name not in apps))

    def tell(self) -> None:
        """Have the keeper know what is not to change hands should this process die."""
        active = {
            app.name for app in self._apps.values() if app.stays_in_pause and app.is_paused and app.is_active
        }
        keep = self._keep_of(active | self.kept) if active or self.kept else wire.Keep(())
        if self.session is not None and keep != self._told:
            self._told = keep
            self.session.keep(keep)

    async def leave(self, session: Session) -> bool:
        """Leave the session to its keeper, if something is paused. False: it is still ours to end."""
        return bool(self.kept) and await session.leave(self._keep_of(self.kept))


__all__ = ["Keeping"]
