"""Programs that run while an app is active: one file each, one protocol (``ports.Backend``)."""

from __future__ import annotations

from phalanx import config, ports
from phalanx.backends.process import ProcessBackend
from phalanx.backends.systemd import SystemdBackend


def make_backend(declared: config.Backend, platform: str = "", node: str = "") -> ports.Backend:
    """The adapter for what an app of *platform* declares as its backend on *node*."""
    match declared:
        case config.Process():
            return ProcessBackend(declared)
        case config.Systemd():
            return SystemdBackend(declared)
        case config.Docker():
            from phalanx.backends.docker import DockerBackend  # an HTTP client, for those who need it

            return DockerBackend(declared, platform, node)


__all__ = ["ProcessBackend", "SystemdBackend", "make_backend"]
