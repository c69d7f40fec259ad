"""What users declare as the program of an app: a process, a systemd unit, a container."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from phalanx.config import rules, texts
from phalanx.config.aliases import (
    ByteCount,
    CommandLine,
    MaybeByteCount,
    PathText,
    Seconds,
    Texts,
    default,
)
from phalanx.config.checks import Check
from phalanx.config.declaration import Declaration
from phalanx.config.rules import About

# --- what every kind of backend has, each in its own place among its fields


def _stop_timeout(meaning: str) -> About:
    return About(
        meaning,
        rules.Duration(0, 3600),
        trade_off="A planned hand-over may take this long. A session that runs out does not wait for it.",
    )


def _ready(without: str) -> About:
    return About(
        "The app is active only once this check is healthy.", rules.Nested("a check"), default=without
    )


_READY_TIMEOUT = About(
    "Not ready after this long: the activation has failed, and another node is tried.",
    rules.Duration(0.05, 3600),
)


class Limits(Declaration, frozen=True, kw_only=True):
    """What a process may use at most. A limit that this host cannot enforce is refused at start.

    `memory`, `cpus` and `processes` count for all of its processes together, and need cgroup v2: run the node
    as a service with `Delegate=yes`. The others are for each of its processes (setrlimit(2), nice(2)).
    """

    memory: Annotated[
        MaybeByteCount,
        About(
            "Memory; above it the kernel kills all of the program (`memory.max`).",
            rules.Bytes(1 << 20, 1 << 50, optional=True),
        ),
    ] = default(None)
    cpus: Annotated[
        float | None,
        About("Processor time, in processors (`cpu.max`).", rules.Number(0.01, 4096, optional=True)),
    ] = None
    processes: Annotated[
        int | None,
        About("Processes and threads (`pids.max`).", rules.Whole(1, 1 << 22, optional=True)),
    ] = None
    open_files: Annotated[
        int | None,
        About(
            "Open files.", rules.Whole(16, 1 << 30, optional=True), default="as many as the node itself may"
        ),
    ] = None
    core: Annotated[
        MaybeByteCount,
        About("Size of a core dump.", rules.Bytes(0, 1 << 50, optional=True), default="the node's own"),
    ] = default(None)
    nice: Annotated[
        int | None,
        About(
            "Nice value; below that of the node only root can.",
            rules.Whole(-20, 19, optional=True),
            default="the node's own",
        ),
    ] = None


class _Program(Declaration, frozen=True):
    command: Annotated[CommandLine, About("The program and its arguments.", texts.Command())]


class Process(_Program, frozen=True, kw_only=True, tag="process", tag_field="type"):
    """A program that runs, in a process group of its own, while the app is active on this node."""

    env: Annotated[
        Mapping[str, str],
        About("Environment variables on top of the node's own.", texts.Environment(), default="none"),
    ] = {}
    cwd: Annotated[PathText, About("Working directory.", texts.File(), default="the node's own")] = default(
        ""
    )
    user: Annotated[
        str,
        About(
            "User to run as; only root can.", texts.Text("user name", spaces=False), default="the node's own"
        ),
    ] = ""
    limits: Annotated[
        Limits, About("What it may use at most.", rules.Nested("see Limits"), default="no limits")
    ] = Limits()
    stop_signal: Annotated[str, About("Asks the program to end.", texts.Signal())] = "TERM"
    stop_timeout: Annotated[
        Seconds, _stop_timeout("From the signal until SIGKILL of the whole process group.")
    ] = default(10.0)
    ready: Annotated[Check | None, _ready("none: active as soon as the program runs")] = None
    ready_timeout: Annotated[Seconds, _READY_TIMEOUT] = default(30.0)


class _Unit(Declaration, frozen=True):
    unit: Annotated[
        str,
        About(
            "The unit: a service of the system's manager, such as `wiki.service`, or an instance of a "
            "template (`wiki@blue.service`). Without a suffix it is a service.",
            texts.UnitName(),
        ),
    ]


class Systemd(_Unit, frozen=True, kw_only=True, tag="systemd", tag_field="type"):
    """A systemd unit that runs while the app is active on this node, and only then.

    Leave it disabled: whatever else starts it would run it on a standby.
    """

    stop_timeout: Annotated[
        Seconds, _stop_timeout("From the stop job until SIGKILL of everything in the unit's control group.")
    ] = default(10.0)
    ready: Annotated[Check | None, _ready("none: active as soon as systemd says so")] = None
    ready_timeout: Annotated[Seconds, _READY_TIMEOUT] = default(30.0)


class Docker(Declaration, frozen=True, kw_only=True, tag="docker", tag_field="type"):
    """A container that runs while the app is active on this node: made from an image, or an existing one."""

    image: Annotated[
        str,
        About(
            "The image to make a container of at each start; it must be on this host. This or `container`.",
            texts.Text("image", spaces=False),
        ),
    ] = ""
    container: Annotated[
        str,
        About(
            "An existing container to start and stop, by name. It must have no restart policy of its own.",
            texts.Text("container name", spaces=False),
        ),
    ] = ""
    command: Annotated[
        CommandLine, About("Command of the container.", texts.Command(empty=True), default="the image's own")
    ] = default(())
    env: Annotated[
        Mapping[str, str],
        About("Environment variables of the container.", texts.Environment(), default="none"),
    ] = {}
    ports: Annotated[
        Texts,
        About(
            "Ports to publish: `8080` (the same on both sides), `80:8080` (host:container), "
            "`10.0.0.9:80:8080`, each with `/udp` or `/tcp`.",
            texts.Strings(texts.Text("port", spaces=False)),
        ),
    ] = default(())
    volumes: Annotated[
        Texts,
        About(
            "Mounts, `source:target` or `source:target:ro`; a source with a slash is a path of the host, "
            "which must be there, else a named volume.",
            texts.Strings(texts.Text("volume")),
        ),
    ] = default(())
    network: Annotated[
        str,
        About("Network mode or name of a network.", texts.Text("network", spaces=False), default="`bridge`"),
    ] = ""
    user: Annotated[
        str, About("User inside the container.", texts.Text("user", spaces=False), default="the image's own")
    ] = ""
    memory: Annotated[ByteCount, About("Memory limit; 0: none.", rules.Bytes(0, 1 << 50), default="none")] = (
        default(0)
    )
    init: Annotated[
        bool,
        About(
            "Put Docker's own init before the command: it passes signals on, and reaps orphans.",
            rules.Switch(),
            default="no: a command that handles no signals ignores `stop_signal`, as process 1 does",
        ),
    ] = False
    stop_signal: Annotated[
        str,
        About("Asks the container to end.", texts.Signal(empty=True), default="the image's own, else `TERM`"),
    ] = ""
    stop_timeout: Annotated[Seconds, _stop_timeout("From the signal until SIGKILL.")] = default(10.0)
    ready: Annotated[Check | None, _ready("the image's HEALTHCHECK, else as soon as it runs")] = None
    ready_timeout: Annotated[Seconds, _READY_TIMEOUT] = default(30.0)
    follow_health: Annotated[
        bool,
        About(
            "Whether the container's HEALTHCHECK, if it has one, counts as a check of the app: `unhealthy` "
            "restarts it in place, then another node takes over. Off: it is shown, and decides readiness.",
            rules.Switch(),
            trade_off="Its thresholds are the engine's (`--interval`, `--retries`): 90 s by default.",
        ),
    ] = True
    socket: Annotated[
        PathText, About("Socket of the Docker Engine.", texts.File(), default="`/var/run/docker.sock`")
    ] = default("/var/run/docker.sock")


Backend = Process | Systemd | Docker
BACKENDS = (Process, Systemd, Docker)
