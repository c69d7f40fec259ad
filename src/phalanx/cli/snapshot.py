"""``phalanx snapshot``: an app's snapshots, made, listed, verified, deleted."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from phalanx.cli import exits, output, progress, restore
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.data.snapshots import Snapshot
from phalanx.errors import ConfigError, DatabaseError, DiskFull

snapshot = App(name="snapshot", help="Snapshots of an app's database, and restores from them.")
snapshot.command(restore.restore)

_WHERE = Where()


class Verified(msgspec.Struct, frozen=True):
    """One snapshot that was looked at. ``problem`` is empty if it is good."""

    name: str
    ok: bool
    problem: str = ""


@snapshot.command
def create(
    app: Annotated[str, Parameter(help="The app.")],
    /,
    *,
    node: Annotated[str | None, Parameter(help="The node that makes it; else a standby.")] = None,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Make a snapshot now, on a standby if there is one."""
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    with progress.bar(f"snapshot of {app}", shown=not json) as report:
        name = asyncio.run(_create(client, app, node, report))
    if json:
        output.emit({"app": app, "name": name}, pretty=True)
    else:
        output.say(f"{app}: made ", (name, "bold"))
    return exits.OK


async def _create(client: PlatformClient, app: str, node: str | None, report: progress.Report) -> str:
    async with client:
        return await client.databases.create_snapshot(
            app, node, on_progress=lambda step: report(step.done_bytes, step.total_bytes)
        )


@snapshot.command(name="list")
def list_(
    app: Annotated[str, Parameter(help="The app.")],
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Show the snapshots of an app, oldest first. Any position after the oldest one can be restored."""
    platform, nats = where.find()
    found = asyncio.run(_list(PlatformClient(platform, nats, timeout=where.timeout), app))
    if json:
        shown = [
            {**output.plain(one), "raw_bytes": one.raw_bytes, "position": output.plain(one.position)}
            for one in found
        ]
        output.emit({"app": app, "snapshots": shown}, pretty=True)
    elif not found:
        output.say(f"{app}: no snapshots")
    else:
        output.table(("NAME", "DATA OF", "POSITION", "DATABASE", "STORED", "NODE", "WHY"), _rows(found))
    return exits.OK


async def _list(client: PlatformClient, app: str) -> list[Snapshot]:
    async with client:
        return await (await client.databases.snapshots(app)).list_snapshots()


def _rows(found: list[Snapshot]) -> list[tuple[str, ...]]:
    return [
        (
            one.name,
            output.clock(one.time),
            str(one.position),
            output.size(one.raw_bytes),
            output.size(one.size_bytes),
            one.node or "-",
            f"{one.kind}{': ' if one.note else ''}{one.note}",
        )
        for one in found
    ]


@snapshot.command
def verify(
    app: Annotated[str, Parameter(help="The app.")],
    name: Annotated[str | None, Parameter(help="One snapshot; else all.")] = None,
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Restore snapshots into a temporary folder here, and have SQLite check them.

    Needs room for one database in the temporary folder (TMPDIR). Exit code 1 if one is damaged.
    """
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    found = asyncio.run(_verify(client, app, name, shown=not json))
    if json:
        ok = all(one.ok for one in found)
        output.emit({"app": app, "ok": ok, "snapshots": [output.plain(one) for one in found]}, pretty=True)
    for one in found if not json else ():
        output.say(f"{one.name}: ", ("ok", "green") if one.ok else (one.problem, "bold red"))
    if not found and not json:
        output.say(f"{app}: no snapshots")
    return exits.OK if all(one.ok for one in found) else exits.NO


async def _verify(client: PlatformClient, app: str, name: str | None, *, shown: bool) -> list[Verified]:
    async with client:
        snapshots = await client.databases.snapshots(app)
        there = [one.name for one in await snapshots.list_snapshots()]
        if name is not None:
            _check_name(app, name, there)
        found: list[Verified] = []
        for each in there if name is None else [name]:
            with progress.bar(each, shown=shown) as report:
                try:
                    await snapshots.verify(each, progress=report)
                    found.append(Verified(each, True))
                except (DiskFull, OSError) as error:
                    # It says nothing about the snapshot.
                    raise exits.Failed(f"{each} cannot be looked at in TMPDIR: {error}") from None
                except DatabaseError as error:
                    found.append(Verified(each, False, str(error)))
        return found


@snapshot.command
def delete(
    app: Annotated[str, Parameter(help="The app.")],
    name: Annotated[str, Parameter(help="The snapshot.")],
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Delete a snapshot. The last one is never deleted: new standbys need it."""
    platform, nats = where.find()
    asyncio.run(_delete(PlatformClient(platform, nats, timeout=where.timeout), app, name))
    if json:
        output.emit({"app": app, "name": name, "deleted": True}, pretty=True)
    else:
        output.say(f"{app}: {name} is deleted")
    return exits.OK


async def _delete(client: PlatformClient, app: str, name: str) -> None:
    async with client:
        snapshots = await client.databases.snapshots(app)
        _check_name(app, name, [one.name for one in await snapshots.list_snapshots()])
        await snapshots.delete(name)


def _check_name(app: str, name: str, there: list[str]) -> None:
    if name not in there:
        remedy = f"see: phalanx snapshot list {app}"
        raise ConfigError("snapshot", name, f"app {app!r} has no such snapshot", remedy)
