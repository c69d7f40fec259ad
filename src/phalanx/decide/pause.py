"""What a pause changes: nothing changes hands, whatever fails; what ends a section all the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum

from phalanx.types import Pause, Resource

WHOLE_PLATFORM = ""
"""Instead of an app's name: the pause of all apps."""


def pause_of(app: str, pauses: Mapping[str, Pause]) -> Pause | None:
    """The pause that *app* is under: its own, else that of the platform. None while there is none."""
    return pauses.get(app) or pauses.get(WHOLE_PLATFORM)


class Cause(StrEnum):
    """Why an active section would end."""

    ILL = "ill"
    """Its health checks say so."""
    FAILED = "failed"
    """Its program or its ``on_active`` has ended, or an address is not here any more."""
    DATABASE_LOST = "database-lost"
    """What it commits gets neither captured nor into the log."""
    NODE_STOPS = "node-stops"
    SESSION_ENDS = "session-ends"
    """It is lost, or about to run out, or the leader key names another one."""


def ends_section(cause: Cause, *, paused: bool) -> bool:
    """Whether *cause* ends the section.

    In a pause what fails is only reported: the operator, who may be the reason for it, decides. But the
    session's end stays the section's end (G1), and nothing is committed that could be lost unseen (G3).
    """
    return not paused or cause not in (Cause.ILL, Cause.FAILED)


def kept(resources: Iterable[Resource], apps: Collection[str]) -> list[Resource]:
    """What of *resources* outlives a node whose *apps* are paused: of an app everything, or nothing.

    Code inside the node ends with it, so what else its app has ends too, and begins anew.
    """
    known = list(resources)
    apart = {resource.app for resource in known if resource.app not in apps or not resource.adoptable}
    return [resource for resource in known if resource.app not in apart]
