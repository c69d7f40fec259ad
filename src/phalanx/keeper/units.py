"""How the keeper ends a systemd unit whose node died, or is to die."""

from __future__ import annotations

import logging

from phalanx import units
from phalanx.types import Resource

log = logging.getLogger("phalanx.keeper")

KILL_DEADLINE_SECONDS = 2.0


def kill(resource: Resource) -> bool:
    """Whether all of the unit is seen to be gone, and cannot be started again. Blocks, in a thread.

    ``details`` of such a resource: ``unit``, its full name, and ``cgroup``, its control group.
    """
    unit, group = resource.details["unit"], resource.details["cgroup"]
    try:
        report = units.kill(unit, group, KILL_DEADLINE_SECONDS)
    except (OSError, ValueError) as error:
        log.error("app %s: cannot see whether unit %s is gone: %s", resource.app, unit, error)
        return False
    if not report.is_gone:
        log.error("app %s: unit %s does not end: %s", resource.app, unit, report.remaining or report.problem)
        return False
    if report.problem:
        log.error(
            "app %s: systemd did not confirm the end of unit %s: %s", resource.app, unit, report.problem
        )
    if report.killed:
        log.warning("app %s: killed unit %s of epoch %d", resource.app, unit, resource.epoch)
    return True
