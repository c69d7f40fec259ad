"""What the node has asked its keeper for, and what the keeper has not carried out yet."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from phalanx.keeper import note, wire
from phalanx.types import Resource, SessionId


class Wishes:
    """They may come before there is a session. ``keeper.json`` is there just as long as something is to be
    kept: then the node's next life has to find this process."""

    def __init__(self) -> None:
        self.release: wire.Release | None = None
        self.leave: wire.Leave | None = None
        self.streams: wire.Streams | None = None
        """The newest list of session streams, if it is not that of the start any more."""
        self.keep = wire.Keep(())
        """What is to outlive the node: what is paused."""
        self.extended: dict[str, float] = {}
        """Until when what runs of an app may go on without the session, by app."""
        self._noted = False

    def extend(self, app: str, moment: float) -> None:
        """What runs of *app* may go on until *moment*; WITHDRAWN: no longer than the session."""
        if moment == wire.WITHDRAWN:
            self.extended.pop(app, None)
            return
        self.extended[app] = max(self.extended.get(app, float("-inf")), moment)

    def extended_until(self, resources: Collection[Resource]) -> float:
        """Until when all of *resources* may go on without the session; where nothing runs, until when the
        node may still have something to give back. -inf: not at all."""
        if not resources:
            return max(self.extended.values(), default=float("-inf"))
        return min(self.extended.get(resource.app, float("-inf")) for resource in resources)

    def note_keep(self, keep: wire.Keep, state_dir: Path, session: SessionId) -> None:
        """From now on *keep* is to outlive the node."""
        self.keep = keep
        if bool(keep.apps) is self._noted:
            return
        self._noted = not self._noted
        if self._noted:
            note.write(state_dir, session)
        else:
            note.remove(state_dir)

    def forget(self, state_dir: Path) -> None:
        """All has ended: there is nothing left to find."""
        if self._noted:
            note.remove(state_dir)


__all__ = ["Wishes"]
