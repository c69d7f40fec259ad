"""What a node's part of an app's database is."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """What this node's part of the database is."""

    STARTING = "starting"
    SETTLING = "settling"
    """A live database of an earlier reign is compared with the log."""
    BOOTSTRAPPING = "bootstrapping"
    """A snapshot is on its way."""
    FOLLOWING = "following"
    KEPT = "kept"
    """The live database of this node's last reign: nobody has led since, so the next one goes on with it."""
    LIVE = "live"
    BROKEN = "broken"
    STOPPED = "stopped"
