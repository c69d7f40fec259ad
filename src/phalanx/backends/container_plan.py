"""What a container is made of, and what would keep it from this host: looked at before anything is made."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from phalanx.backends.engine import Engine, EngineError, Inspection, Summary
from phalanx.config import Docker
from phalanx.config.docker import Mount, PublishedPort
from phalanx.errors import BackendError
from phalanx.ports import SectionContext

PLATFORM, NODE, APP, EPOCH, RUN = (f"phalanx.{what}" for what in ("platform", "node", "app", "epoch", "run"))
"""The labels of a container that Phalanx made, see docs/storage.md."""

LOG_BYTES, LOG_FILES = 10_000_000, 2
"""How much of a container's output the engine keeps: files of that size, that many."""

_BUILT_IN = ("default", "bridge", "host", "none", "container")

Json = dict[str, Any]


def owner(platform: str, node: str, app: str) -> dict[str, str]:
    """The labels that tell one node's containers of one app from all others on the engine."""
    return {PLATFORM: platform, NODE: node, APP: app}


def body(config: Docker, section: SectionContext, labels: Mapping[str, str]) -> Json:
    """What the engine is asked to make (Engine API, ContainerCreate)."""
    env = {
        "PHALANX_PLATFORM": section.platform,
        "PHALANX_NODE": section.node,
        "PHALANX_APP": section.app,
        "PHALANX_EPOCH": str(section.epoch),
        **({"PHALANX_DATABASE": section.database} if section.database else {}),
        **config.env,
    }
    published = [PublishedPort.parse(text) for text in config.ports]
    bindings: dict[str, list[dict[str, str]]] = {}
    for port in published:
        at = bindings.setdefault(f"{port.container}/{port.protocol}", [])
        at.append({"HostIp": port.address, "HostPort": str(port.host)})
    return {
        "Image": config.image,
        **({"Cmd": list(config.command)} if config.command else {}),
        **({"User": config.user} if config.user else {}),
        "Env": [f"{key}={value}" for key, value in env.items()],
        "Labels": dict(labels),
        "ExposedPorts": {key: {} for key in bindings},
        "HostConfig": {
            "RestartPolicy": {"Name": "no"},
            "AutoRemove": False,  # its end has to be seen first
            "Init": config.init,
            "PortBindings": bindings,
            "Mounts": [_mount(Mount.parse(text)) for text in config.volumes],
            "NetworkMode": config.network or "default",
            "Memory": config.memory,
            "LogConfig": {
                "Type": "json-file",
                "Config": {"max-size": str(LOG_BYTES), "max-file": str(LOG_FILES)},
            },
        },
    }


def _mount(mount: Mount) -> Json:
    return {
        "Type": "bind" if mount.is_bind else "volume",
        "Source": mount.source,
        "Target": mount.target,
        "ReadOnly": mount.read_only,
    }


# --- whether it can be


async def check(config: Docker, app: str, ours: Mapping[str, str]) -> None:
    """Look whether it could be started on this host. Raises BackendError (``prepare``)."""
    _check_socket(config.socket, app)
    _check_mounts(config, app)
    async with Engine(config.socket) as engine:
        try:
            await engine.version()
        except EngineError as error:
            problem = f"the Docker Engine at {config.socket} does not answer: {error}"
            remedy = "see why, and start it anew: systemctl status docker, systemctl restart docker"
            raise BackendError(app, "prepare", problem, remedy) from error
        try:
            await _check_container(engine, config, app, ours)
        except EngineError as error:
            raise BackendError(app, "prepare", f"the Docker Engine says: {error}", "look at it") from error


def _check_socket(path: str, app: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        problem, remedy = f"there is no Docker Engine at {path}", "install and start it, or correct socket"
        raise BackendError(app, "prepare", problem, remedy) from None
    except OSError as error:
        raise BackendError(app, "prepare", f"{path}: {error.strerror}", "correct socket") from None
    if not is_socket:
        raise BackendError(app, "prepare", f"{path} is no socket", "correct socket")
    if not os.access(path, os.W_OK):
        problem = f"no right to use the Docker Engine at {path}"
        remedy = "put the node's user into the group docker, or run the node as root"
        raise BackendError(app, "prepare", problem, remedy)


def _check_mounts(config: Docker, app: str) -> None:
    for mount in map(Mount.parse, config.volumes):
        if mount.is_bind and not os.path.exists(mount.source):
            problem = f"the mounted {mount.source} does not exist on this host"
            raise BackendError(app, "prepare", problem, "create it, or correct volumes")


async def _check_container(engine: Engine, config: Docker, app: str, ours: Mapping[str, str]) -> None:
    if config.container:
        found = await existing(engine, config.container, app)
        bindings = found.host_config.port_bindings or {}
        wanted = [
            PublishedPort(at.host_ip, int(at.host_port), int(port), protocol)
            for key, ats in bindings.items()
            for port, _, protocol in [key.partition("/")]
            for at in ats or ()
            if at.host_port.isdecimal()
        ]
        await _check_ports(engine, wanted, app, ours, found.id)
        return
    if not await engine.has_image(config.image):
        raise _no_image(app, config.image)
    network = config.network
    if network and network.partition(":")[0] not in _BUILT_IN and not await engine.has_network(network):
        problem = f"there is no network {network!r}"
        raise BackendError(app, "prepare", problem, f"docker network create {network}")
    await _check_ports(engine, map(PublishedPort.parse, config.ports), app, ours, "")


async def existing(engine: Engine, name: str, app: str) -> Inspection:
    """The inspection of an existing container that can be ours. Raises BackendError, EngineError."""
    found = await engine.inspect(name)
    if found is None:
        problem = f"there is no container {name!r} on this host"
        raise BackendError(
            app, "prepare", problem, f"docker create --name {name} IMAGE, or correct container"
        )
    host = found.host_config
    policy = (host.restart_policy.name if host.restart_policy else "") or "no"
    if policy != "no":
        problem = (
            f"container {name!r} has the restart policy {policy!r}: the engine would start it on a standby"
        )
        raise BackendError(app, "prepare", problem, f"docker update --restart=no {name}")
    if host.auto_remove:
        problem = f"container {name!r} was made with --rm: it is gone after its first stop"
        raise BackendError(app, "prepare", problem, "make it again without --rm")
    return found


async def _check_ports(
    engine: Engine, wanted: Iterable[PublishedPort], app: str, ours: Mapping[str, str], container: str
) -> None:
    """What of the app itself has them does not count: it runs here already, or is replaced."""
    taken = [port for port in wanted if _in_use(port)]
    if not taken:
        return
    same_app = {key: ours[key] for key in (PLATFORM, APP)}.items()

    def is_ours(one: Summary) -> bool:
        return one.id == container or same_app <= (one.labels or {}).items()

    holders = {
        port.public_port: "" if is_ours(one) else f" by container {one.id[:12]}"
        for one in await engine.running()
        for port in one.ports or ()
    }
    for port in taken:
        if holders.get(port.host) != "":
            problem = f"port {port.host}/{port.protocol} of this host is in use{holders.get(port.host, '')}"
            raise BackendError(app, "prepare", problem, f"see who has it: ss -lntup 'sport = :{port.host}'")


def _in_use(port: PublishedPort) -> bool:
    family = socket.AF_INET6 if ":" in port.address else socket.AF_INET
    kind = socket.SOCK_DGRAM if port.protocol == "udp" else socket.SOCK_STREAM
    try:
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((port.address, port.host))
    except OSError as error:
        # An address that is not here may be a virtual one that comes later; rights are the engine's matter.
        return error.errno == errno.EADDRINUSE
    return False


def _no_image(app: str, image: str) -> BackendError:
    problem = f"image {image!r} is not on this host"
    return BackendError(app, "prepare", problem, f"docker pull {image}, or docker load -i FILE")


def cannot_make(app: str, config: Docker, error: EngineError) -> BackendError:
    """Why no container could be made, and what to do."""
    if error.status == 404 and "image" in error.message.lower():
        return _no_image(app, config.image)
    if error.status == 0:
        problem = f"the Docker Engine at {config.socket} does not answer: {error}"
        return BackendError(app, "start", problem, "look at the Docker Engine")
    return BackendError(app, "prepare", f"the Docker Engine refuses it: {error}", "correct its declaration")
