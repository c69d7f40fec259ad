"""How the keeper ends a container whose node died, or is to die."""

from __future__ import annotations

import logging

from phalanx import containers
from phalanx.types import Resource

log = logging.getLogger("phalanx.keeper")


def kill(resource: Resource) -> bool:
    """Whether nothing of the container runs, for certain. Blocks, in a thread; doing it again is harmless."""
    container = resource.details["container"]
    report = containers.end(containers.Target.of(resource))
    if not report.gone:
        log.error("app %s: container %.12s does not end: %s", resource.app, container, report.problem)
        return False
    if report.problem:
        log.error("app %s: container %.12s has ended, but: %s", resource.app, container, report.problem)
    log.warning("app %s: ended container %.12s of epoch %d", resource.app, container, resource.epoch)
    return True
