"""Programs that run while an app is active: one file each, one protocol (``ports.Backend``)."""

from __future__ import annotations

from phalanx import config, ports
from phalanx.backends.process import ProcessBackend


def make_backend(declared: config.Backend) -> ports.Backend:
    """The adapter for what an app declares as its backend."""
    match declared:
        case config.Process():
            return ProcessBackend(declared)


__all__ = ["ProcessBackend", "make_backend"]
