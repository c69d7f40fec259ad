"""What can be known to be wrong before a node starts: then nothing is made, neither files nor streams."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.bus.server_process import ServerProcess
from phalanx.config import EmbeddedNats, NatsOptions, PlatformConfig
from phalanx.errors import BusError, BusTimeout, ConfigError, NatsUnusable, StartError
from phalanx.names import Names

PERMISSION = "permissions violation"
"""What nats-server calls it."""


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
        await check_nats(config.name, config.nats, timeout)


async def check_nats(platform: str, options: NatsOptions, timeout: float) -> None:
    """Connect, ask for JetStream, and see whether this user may make streams. Raises NatsUnusable."""
    bus = await NatsBus.connect(options, name="phalanx preflight", timeout=timeout)
    try:
        try:
            await provision.check_nats(bus)
        except NatsUnusable as error:
            raise _refused(bus, options) or error from None
        await _check_may_create(bus, Names(platform), options)
    finally:
        await bus.close()


async def _check_may_create(bus: NatsBus, names: Names, options: NatsOptions) -> None:
    """A request without content makes nothing: whoever may not send it gets no answer, others an error."""
    for stream in (names.bucket_stream(names.platform_bucket), names.audit_stream):
        try:
            await bus.api(f"STREAM.CREATE.{stream}", {}, timeout=2.0)
        except BusTimeout:
            if (error := _refused(bus, options)) is not None:
                raise error from None
        except BusError:
            return  # answered: that is enough


def _refused(bus: NatsBus, options: NatsOptions) -> NatsUnusable | None:
    """What the server said of a missing permission, if that is what it said."""
    if PERMISSION not in bus.last_error.lower():
        return None
    who = f"user {options.user!r}" if options.user else "this login"
    return NatsUnusable(
        f"{who} may not do what a node does at {bus.server_name}: {bus.last_error}",
        "log in as the node's user (nats.user), or allow it; see: phalanx nats permissions",
    )


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
