"""Programs that run while an app is active: one file each, one protocol (``ports.Backend``)."""

from __future__ import annotations

from phalanx import config, ports
from phalanx.backends.holder import Holder
from phalanx.backends.process import ProcessBackend
from phalanx.backends.systemd import SystemdBackend


def make_backend(
    declared: config.Backend, platform: str = "", node: str = "", holder: Holder | None = None
) -> ports.Backend:
    """The adapter for what an app of *platform* declares as its backend on *node*.

    *holder*: the parent of the node's processes; None where they are the node's own children.
    """
    match declared:
        case config.Process():
            return ProcessBackend(declared, holder)
        case config.Systemd():
            return SystemdBackend(declared)
        case config.Docker():
            from phalanx.backends.docker import DockerBackend  # an HTTP client, for those who need it

            return DockerBackend(declared, platform, node)


__all__ = ["Holder", "ProcessBackend", "SystemdBackend", "make_backend"]
