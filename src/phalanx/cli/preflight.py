"""What can be known to be wrong before a node starts: then nothing is made, neither files nor streams."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.bus.server_process import ServerProcess
from phalanx.config import EmbeddedNats, NatsOptions, PlatformConfig
from phalanx.errors import ConfigError, StartError


async def check(config: PlatformConfig, *, timeout: float = 10.0) -> None:
    """Raises ConfigError, StartError or NatsUnusable for the first thing that keeps the node from starting.

    *timeout*: how long connecting to NATS may take, in seconds.
    """
    if problem := data_dir_problem(config):
        raise problem
    if problem := http_problem(config):
        raise problem
    if isinstance(config.nats, EmbeddedNats):
        if problem := embedded_problem(config, config.nats):
            raise problem
    else:
        await check_nats(config.nats, timeout)


async def check_nats(options: NatsOptions, timeout: float) -> None:
    """Connect, and ask for JetStream. Raises NatsUnusable."""
    bus = await NatsBus.connect(options, name="phalanx preflight", timeout=timeout)
    try:
        async with asyncio.timeout(30):
            await provision.check_nats(bus)
    finally:
        await bus.close()


def data_dir_problem(config: PlatformConfig) -> ConfigError | None:
    """Whether the data directory can be written, or made; it is not made."""
    path = Path(str(config.data_dir))
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    remedy = "set data_dir (or PHALANX_DATA) to a folder that this user can write"
    if not existing.is_dir():
        return ConfigError("platform.data_dir", str(path), f"{existing} is no folder", remedy)
    if not os.access(existing, os.W_OK | os.X_OK):
        return ConfigError("platform.data_dir", str(path), f"{existing} cannot be written", remedy)
    return None


def http_problem(config: PlatformConfig) -> ConfigError | None:
    """Whether the HTTP server's address can be had."""
    http = config.http
    if not http.enabled or http.port == 0:
        return None
    problem = cannot_listen(http.host, http.port)
    if problem is None:
        return None
    return ConfigError(
        "http.port",
        http.port,
        f"{http.host}:{http.port}: {problem}",
        "stop what listens there, or choose another (0: any free one; PHALANX_HTTP=off: none)",
    )


def embedded_problem(config: PlatformConfig, nats: EmbeddedNats) -> ConfigError | StartError | None:
    """Whether the embedded server's ports can be had; its own left-over server may have them."""
    from phalanx.bus.binary import nats_server_binary

    try:
        nats_server_binary()
    except StartError as error:
        return error
    if ServerProcess.find(Path(str(config.data_dir)) / "nats") is not None:
        return None
    ports = [("port", nats.port)]
    ports += [("cluster_port", nats.cluster_port)] if nats.routes else []
    ports += [("monitor_port", nats.monitor_port)] if nats.monitor_port else []
    for field, port in ports:
        if problem := cannot_listen(nats.host, port):
            return ConfigError(
                f"nats.embedded.{field}",
                port,
                f"{nats.host}:{port}: {problem}",
                "stop what listens there, or choose another port",
            )
    return None


def cannot_listen(host: str, port: int) -> str | None:
    """Why nobody could listen there now; None if one could."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None
