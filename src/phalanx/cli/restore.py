"""``phalanx snapshot restore``: a database as it was, into a file here or in the place of the present one."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from phalanx import system
from phalanx.cli import exits, output, progress
from phalanx.cli.audit import moment
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.client_db import Restored
from phalanx.data import restoring
from phalanx.data.restoring import Restoring, Wanted
from phalanx.data.status import RestoreRequest
from phalanx.errors import ConfigError, DatabaseError

_WHERE = Where()


class _What(msgspec.Struct, frozen=True):
    """Which state is wanted, and how it was said."""

    wanted: Wanted
    key: str = ""
    value: str = ""

    @property
    def request(self) -> RestoreRequest:
        """The same, as nodes are asked."""
        wanted = self.wanted
        return RestoreRequest(wanted.snapshot, wanted.sequence or None, wanted.time or None)


def restore(
    app: Annotated[str, Parameter(help="The app.")],
    name: Annotated[str | None, Parameter(help="The snapshot to restore.")] = None,
    /,
    *,
    at: Annotated[
        str | None, Parameter(help="The state at that time: 90s, 10m, 2h, 7d ago, or 2025-05-01T12:00.")
    ] = None,
    position: Annotated[str | None, Parameter(help="The state at that position of the log.")] = None,
    to: Annotated[str | None, Parameter(help="A new file, here on this machine.")] = None,
    in_place: Annotated[bool, Parameter(help="The app's own database, on its nodes.")] = False,
    yes: Annotated[bool, Parameter(help="With --in-place: do not ask.")] = False,
    wait: Annotated[float, Parameter(help="With --in-place: how long it may take, in seconds.")] = 600.0,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Restore a database as it was: of a snapshot, at a time, or at a position; --to alone: the newest state.

    With --to it becomes a new file here; no node takes part. With --in-place the app stops, and goes on with
    that database; it asks before it does this.
    """
    if not 0.1 <= wait <= 86400:
        raise ConfigError("--wait", wait, "out of range", "choose 0.1 to 86400 seconds")
    what = _what(name, at, position)
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    if in_place:
        if to is not None:
            raise ConfigError("--to", to, "--in-place is given too", "give one of them")
        if not what.key:
            raise ConfigError("--in-place", True, "which state?", "give --at, --position or a snapshot")
        return _restore_in_place(client, app, what, yes=yes, wait=wait, json=json)
    if to is None:
        raise ConfigError("--to", None, "restore it where?", "give --to FILE, or --in-place")
    return _restore_to(client, app, what, _target(to), json=json)


def _what(name: str | None, at: str | None, position: str | None) -> _What:
    given = [
        (key, value)
        for key, value in (("snapshot", name), ("--at", at), ("--position", position))
        if value is not None
    ]
    if not given:
        return _What(Wanted())
    key, value = given[-1]
    if len(given) > 1:
        raise ConfigError(key, value, f"{given[0][0]} is given too", "give one of them")
    if key == "snapshot":
        return _What(Wanted(snapshot=value), key, value)
    if key == "--position":
        return _What(Wanted(sequence=_sequence(value)), key, value)
    try:
        time = moment(value, system.wall())
    except ConfigError as error:
        raise ConfigError("--at", value, error.problem, error.remedy) from None
    return _What(Wanted(time=max(time, 0.001)), key, value)


def _sequence(text: str) -> int:
    """Of ``812``, or of ``812/790`` as positions are shown."""
    number = text.partition("/")[0]
    if number.isascii() and number.isdigit() and len(number) < 20 and int(number):
        return int(number)
    raise ConfigError("--position", text, "not a position", "write a number from 1 on, such as 812")


def _target(to: str) -> Path:
    path = Path(to).absolute()
    if to.endswith("/") or path.is_dir():
        raise ConfigError("--to", to, "a folder", "name a file that does not exist yet")
    if os.path.lexists(path):
        raise ConfigError("--to", to, "exists, and is not overwritten", "name a file that does not exist yet")
    if not path.parent.is_dir():
        raise ConfigError("--to", to, f"there is no folder {path.parent}", "make it, or name another place")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError("--to", to, f"{path.parent} cannot be written", "name another place")
    return path


# --- into a file


def _restore_to(client: PlatformClient, app: str, what: _What, target: Path, *, json: bool) -> int:
    with progress.bar(f"{app} to {target.name}", shown=not json) as report:
        done = asyncio.run(_to_file(client, app, what, target, report))
    if json:
        output.emit({"app": app, "file": str(target), **output.plain(done)}, pretty=True)
    else:
        source = f"from {done.snapshot} and" if done.snapshot else "from"
        output.say(
            f"{app}: ",
            (str(target), "bold"),
            f" has the state at {done.position}, {source} {done.records} records of the log "
            f"({output.size(done.size_bytes)}, {output.span(done.seconds)})",
        )
    return exits.OK


async def _to_file(
    client: PlatformClient, app: str, what: _What, target: Path, report: progress.Report
) -> restoring.Restored:
    async with client:
        made = await client.databases.restoring(app)
        await _check(made, app, what)
        try:
            return await made.restore(what.wanted, target, report)
        except OSError as error:
            raise DatabaseError(f"{target}: {error.strerror or error}") from error


async def _check(made: Restoring, app: str, what: _What) -> int:
    """The position that will be restored. A state that is not to be had is bad input."""
    try:
        return (await made.plan(what.wanted)).sequence
    except DatabaseError as error:
        if not what.key:
            raise
        remedy = error.remedy or f"see: phalanx snapshot list {app}"
        raise ConfigError(what.key, what.value, error.problem, remedy) from None


# --- in place


def _restore_in_place(
    client: PlatformClient, app: str, what: _What, *, yes: bool, wait: float, json: bool
) -> int:
    # Asked between two runs: a thread that waits for the keyboard would keep Ctrl-C waiting.
    consequences = asyncio.run(_consequences(client, app, what))
    if not yes:
        if json or not sys.stdin.isatty():
            raise ConfigError("--yes", False, "this replaces the database of the app", "say --yes")
        output.note(consequences)
        if not _agreed():
            output.note("nothing was changed")
            return exits.NO
    done = asyncio.run(_in_place(client, app, what, wait))
    if json:
        output.emit(done, pretty=True)
    else:
        output.say(
            f"{app}: ",
            (done.node, "bold green"),
            f" is active with the restored database after {output.span(done.seconds)}"
            f" (epoch {done.epoch}){': ' if done.reason else ''}{done.reason}",
        )
    return exits.OK


async def _in_place(client: PlatformClient, app: str, what: _What, wait: float) -> Restored:
    async with client:
        return await client.databases.restore_in_place(app, what.request, timeout=wait)


async def _consequences(client: PlatformClient, app: str, what: _What) -> str:
    """What will be lost. Raises ConfigError for a state that is not to be had."""
    async with client:
        sequence = await _check(await client.databases.restoring(app), app, what)
        view = await client.databases.status(app)
    now = max((node.position for node in view.nodes), default=None)
    later = f", {max(0, now.sequence - sequence)} entries of the log later" if now is not None else ""
    return (
        f"{app}: its database (now at {now or '?'}{later}) is replaced by its state at {sequence}. "
        "What was committed since then is undone (it stays restorable, by position). The app stops meanwhile."
    )


def _agreed() -> bool:
    print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
