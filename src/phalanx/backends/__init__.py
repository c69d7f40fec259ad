"""Programs that run while an app is active: one file each, one protocol (``ports.Backend``)."""

from __future__ import annotations

from phalanx import config, ports
from phalanx.backends.docker import DockerBackend
from phalanx.backends.process import ProcessBackend
from phalanx.backends.systemd import SystemdBackend


def make_backend(declared: config.Backend) -> ports.Backend:
    """The adapter for what an app declares as its backend."""
    match declared:
        case config.Process():
            return ProcessBackend(declared)
        case config.Systemd():
            return SystemdBackend(declared)
        case config.Docker():
            return DockerBackend(declared)


__all__ = ["DockerBackend", "ProcessBackend", "SystemdBackend", "make_backend"]
