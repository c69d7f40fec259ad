"""``phalanx db``: where each node is with an app's database, whether all have the same, what is left over."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cyclopts import App, Parameter

from phalanx.cli import exits, output, progress
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.client_db import DatabaseView, Verification
from phalanx.data.status import DbDifference, DbStatus, DivergedFile, TableDifference, lacking
from phalanx.errors import ConfigError, PhalanxError

db = App(name="db", help="The databases of apps: state, verification, what was set aside.")

_WHERE = Where()
_STYLES = {"live": "bold green", "following": "green", "kept": "yellow", "broken": "bold red"}
Cell = str | tuple[str, str]


# --- status


@db.command
def status(
    app: Annotated[str | None, Parameter(help="The app; else all that have a database.")] = None,
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Show on each node the role of the database, its position, and how far it is behind.

    Exit code 1 when the log or the object store of a database is gone.
    """
    platform, nats = where.find()
    views = asyncio.run(_status(PlatformClient(platform, nats, timeout=where.timeout), app))
    if json:
        output.emit({"platform": platform, "databases": views}, pretty=True)
    elif not views:
        output.say(f"no app of {platform} has a database")
    for number, view in enumerate(() if json else views):
        if number:
            output.say("")
        _show_status(view)
    return exits.NO if any(view.problems for view in views) else exits.OK


async def _status(client: PlatformClient, app: str | None) -> list[DatabaseView]:
    async with client:
        names = await client.databases.apps() if app is None else [app]
        return list(await asyncio.gather(*(client.databases.status(name) for name in names)))


def _show_status(view: DatabaseView) -> None:
    end = max((node.known_end for node in view.nodes), default=0)
    snapshot = next((node.snapshot for node in view.nodes if node.snapshot), "none")
    output.say((view.app, "bold"), f": log ends at {end}, newest snapshot {snapshot}")
    for problem in view.problems:
        output.say((problem, "bold red"))
    rows = [
        _status_row(node) for node in sorted(view.nodes, key=lambda each: (each.role != "live", each.node))
    ]
    rows += [(node, ("silent", "bold red"), "-", "-", "-", "-", "") for node in view.silent]
    output.table(("NODE", "ROLE", "POSITION", "BEHIND", "SIZE", "EPOCH", "NOTES"), rows)


def _status_row(node: DbStatus) -> tuple[Cell, ...]:
    return (
        node.node,
        (node.role, _STYLES.get(node.role, "")),
        str(node.position),
        _behind(node),
        output.size(node.size_bytes) if node.size_bytes else "-",
        str(node.epoch or "-"),
        "; ".join(_notes(node)),
    )


def _behind(node: DbStatus) -> str:
    if not node.lag_records:
        return "-"
    records = f"{node.lag_records} record{'' if node.lag_records == 1 else 's'}"
    return f"{records}, {output.span(node.lag_seconds)}, {output.size(node.lag_bytes)}"


def _notes(node: DbStatus) -> list[str]:
    notes = [node.reason] if node.reason else []
    if node.spool_bytes:
        waiting = node.captured_txid - node.shipped_txid
        notes.append(f"{output.size(node.spool_bytes)} wait for the log ({waiting} records)")
    if node.diverged:
        notes.append(f"{node.diverged} diverged: see phalanx db diverged {node.app}")
    return notes


# --- verify


@db.command
def verify(
    app: Annotated[str, Parameter(help="The app.")],
    /,
    *,
    wait: Annotated[float, Parameter(help="How long a node may take, in seconds.")] = 600.0,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Have every node check its whole database, and compare them with one another and with the log.

    Exit code 1 when a database is damaged or differs, or when nothing could be compared.
    """
    _check_wait(wait)
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    with progress.bar(f"reading the databases of {app}", shown=not json):
        found = asyncio.run(_verify(client, app, wait))
    if json:
        output.emit(found, pretty=True)
    else:
        _show_verification(found)
    return exits.OK if found.ok else exits.NO


async def _verify(client: PlatformClient, app: str, wait: float) -> Verification:
    async with client:
        return await client.databases.verify(app, timeout=wait)


def _show_verification(found: Verification) -> None:
    output.table(
        ("NODE", "INTEGRITY", "POSITION", "FINGERPRINT"),
        [
            (
                node.node,
                ("ok", "green") if node.ok else ("damaged", "bold red"),
                str(node.position),
                node.fingerprint[:32] or "-",
            )
            for node in found.nodes
        ],
    )
    for problem in found.problems:
        output.say((problem, "red"))
    for note in found.notes if found.ok else ():
        output.say((note, "yellow"))
    if found.ok and found.compared:
        output.say((f"as it should be: {', '.join(found.compared)}", "green"))


# --- diverged


@db.command
def diverged(
    app: Annotated[str, Parameter(help="The app.")],
    /,
    *,
    node: Annotated[str | None, Parameter(help="Only what was set aside on that node.")] = None,
    diff: Annotated[bool, Parameter(help="Show the rows in which it differs from the present one.")] = False,
    rows: Annotated[int, Parameter(help="With --diff: how many rows of each table.")] = 5,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """List databases that were set aside because they held what the log lacks. They are never deleted."""
    if not 0 <= rows <= 1000:
        raise ConfigError("--rows", rows, "out of range", "choose 0 to 1000")
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    files, differences = asyncio.run(_diverged(client, app, node, rows if diff else None))
    if json:
        output.emit({"app": app, "files": files, "differences": differences}, pretty=True)
    else:
        _show_diverged(app, files)
        for difference in differences:
            _show_difference(difference)
    return exits.NO if any(each.error for each in differences) else exits.OK


async def _diverged(
    client: PlatformClient, app: str, node: str | None, rows: int | None
) -> tuple[list[DivergedFile], list[DbDifference]]:
    async with client:
        files = [file for file in await client.databases.diverged(app) if node is None or file.node == node]
        if node is not None and not files:
            view = await client.databases.status(app)
            known = sorted(each.node for each in view.nodes)
            if node not in known:
                remedy = f"choose from: {', '.join(known) or '(none answers)'}"
                raise ConfigError("--node", node, "no node with that database answers so", remedy)
        if rows is None:
            return files, []
        return files, [await _difference(client, app, file, rows) for file in files]


async def _difference(client: PlatformClient, app: str, file: DivergedFile, rows: int) -> DbDifference:
    """One that cannot be compared does not keep the others from being shown."""
    try:
        return await client.databases.difference(app, file.node, file.file, rows=rows)
    except PhalanxError as error:
        return DbDifference(node=file.node, file=file.file, error=str(error))


def _show_diverged(app: str, files: list[DivergedFile]) -> None:
    if not files:
        output.say(f"{app}: nothing was set aside")
        return
    output.table(
        ("NODE", "EPOCH", "SET ASIDE", "AFTER", "TRANSACTIONS", "SIZE", "FILE"),
        [
            (
                file.node,
                str(file.epoch),
                output.clock(file.time),
                f"{file.sequence}/{file.txid}",
                lacking(file.transactions, file.exact),
                output.size(file.size_bytes),
                file.file,
            )
            for file in files
        ],
    )


def _show_difference(found: DbDifference) -> None:
    output.say("")
    output.say((f"{found.node}: {found.file}", "bold"))
    if found.error:
        output.say((found.error, "red"))
    elif not found.tables:
        output.say("all tables have the same rows as the present database")
    for table in found.tables:
        output.say(
            (table.table, "bold"),
            f": {table.only_diverged} rows only here, {table.only_present} only in the present database",
            f" ({table.problem})" if table.problem else "",
        )
        _show_rows(table)


def _show_rows(table: TableDifference) -> None:
    sides = (("only here", table.diverged_rows), ("only present", table.present_rows))
    rows = [
        (side, *("NULL" if value is None else value for value in row))
        for side, found in sides
        for row in found
    ]
    if rows:
        output.table(("", *table.columns), rows)


def _check_wait(wait: float) -> None:
    if not 0.1 <= wait <= 86400:
        raise ConfigError("--wait", wait, "out of range", "choose 0.1 to 86400 seconds")


__all__ = ["db"]
