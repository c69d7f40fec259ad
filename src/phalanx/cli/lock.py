"""``phalanx lock``: who holds locks and semaphores, who waits for them, and taking one away by force."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

from cyclopts import App, Parameter

from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.client_lock_views import LockReleased, LockView
from phalanx.coord.lock_body import Kind
from phalanx.errors import ConfigError

lock = App(name="lock", help="Locks and semaphores of the platform and of its apps.")

_WHERE = Where()

_AppOption = Annotated[str | None, Parameter(help="The app whose lock it is; else it is the platform's.")]
_SemaphoreOption = Annotated[bool, Parameter(help="A semaphore of that name, not a lock.")]


@lock.command(name="list")
def list_(
    app: Annotated[str | None, Parameter(help="The app; else the platform and all apps.")] = None,
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Show what is held, by whom, and how many wait. Exit code 2 for an unknown app."""
    platform, nats = where.find()
    found = asyncio.run(_list(PlatformClient(platform, nats, timeout=where.timeout), app))
    if json:
        output.emit({"locks": [_shown(each) for each in found]}, pretty=True)
    elif not found:
        output.say("no lock is held")
    else:
        output.table(("APP", "KIND", "NAME", "HELD BY", "TOKEN", "WANTED AT", "WAITING"), _rows(found))
    return exits.OK


async def _list(client: PlatformClient, app: str | None) -> list[LockView]:
    async with client:
        return await client.lock_views.held(app)


def _rows(found: list[LockView]) -> list[tuple[str, ...]]:
    return [
        (
            view.app or "-",
            view.status.kind,
            view.status.name,
            holder.node,
            str(holder.token),
            output.clock(holder.time),
            str(sum(waiter.tasks for waiter in view.status.waiters)),
        )
        for view in found
        for holder in view.status.holders
    ]


@lock.command
def show(
    name: Annotated[str, Parameter(help="The lock.")],
    /,
    *,
    app: _AppOption = None,
    semaphore: _SemaphoreOption = False,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Show who holds a lock, and which nodes wait for it, first come first. Exit code 1: nobody holds it."""
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    found = asyncio.run(_show(client, name, app, _kind(semaphore)))
    if json:
        output.emit(_shown(found) if found is not None else _free(name, app, semaphore), pretty=True)
    elif found is None:
        output.say((name, "bold"), ": nobody holds it")
    else:
        _tell(found)
    return exits.OK if found is not None else exits.NO


async def _show(client: PlatformClient, name: str, app: str | None, kind: Kind) -> LockView | None:
    async with client:
        return await client.lock_views.show(name, app, kind=kind)


def _tell(found: LockView) -> None:
    status = found.status
    whose = f" of app {found.app}" if found.app else " of the platform"
    many = f", {len(status.holders)} of {status.permits} permits held" if status.kind == "semaphore" else ""
    output.say((status.name, "bold"), f": {status.kind}{whose}{many}")
    for holder in status.holders:
        epoch = f", epoch {holder.epoch}" if holder.epoch else ""
        output.say(
            f"  held by {holder.session}, token {holder.token}{epoch}, wanted at {output.clock(holder.time)}"
        )
    for waiter in status.waiters:
        output.say(f"  {waiter.node} waits with {waiter.tasks} tasks, since {output.clock(waiter.time)}")


@lock.command
def release(
    name: Annotated[str, Parameter(help="The lock.")],
    /,
    *,
    app: _AppOption = None,
    semaphore: _SemaphoreOption = False,
    token: Annotated[int | None, Parameter(help="Of several holders the one with this token.")] = None,
    yes: Annotated[bool, Parameter(help="Do not ask.")] = False,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Take a lock away from its holder, by force; whoever waits first has it then.

    The holder learns it at once, but its code may run on for a moment: where that could break something, what
    the lock protects has to refuse its token. It asks first. Exit code 1: the answer was no; 2: nobody holds
    it, an unknown app, or neither a terminal nor --yes.
    """
    if not (yes or sys.stdin.isatty()):
        raise ConfigError("--yes", None, "a release by force has to be confirmed", "give --yes")
    platform, nats = where.find()
    client, kind = PlatformClient(platform, nats, timeout=where.timeout), _kind(semaphore)
    if not yes:
        found = asyncio.run(_show(client, name, app, kind))
        if found is None:
            raise ConfigError(str(kind), name, "nobody holds it", "see: phalanx lock list")
        for line in _consequences(found, token):
            output.note(line)
        print(f"take {name} away? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            output.note("nothing was changed")
            return exits.NO
        token = _chosen(found, token)
    done = asyncio.run(_release(client, name, app, kind, token))
    if json:
        output.emit(output.plain(done), pretty=True)
    else:
        then = f"; {done.successor} has it now" if done.successor else "; it is free"
        output.say((name, "bold"), f": taken away from {done.node} (token {done.token}){then}")
    return exits.OK


async def _release(
    client: PlatformClient, name: str, app: str | None, kind: Kind, token: int | None
) -> LockReleased:
    async with client:
        return await client.lock_views.release(name, app, kind=kind, token=token)


def _chosen(found: LockView, token: int | None) -> int | None:
    """What was asked about is what is taken away: not what somebody else holds by then."""
    holders = found.status.holders
    return holders[0].token if token is None and len(holders) == 1 else token


def _consequences(found: LockView, token: int | None) -> list[str]:
    held = [each for each in found.status.holders if token in (None, each.token)]
    lines = [f"{found.status.name} is held by {each.session}, token {each.token}" for each in held]
    lines.append(
        "it learns that it is lost, but what it does with it may go on for a moment, beside the next holder;"
    )
    lines.append("only what checks tokens is safe from that")
    if found.status.waiters:
        lines.append(f"next: {found.status.waiters[0].node}")
    return lines


def _kind(semaphore: bool) -> Kind:
    return Kind.SEMAPHORE if semaphore else Kind.LOCK


def _free(name: str, app: str | None, semaphore: bool) -> dict[str, Any]:
    return {"app": app or "", "name": name, "kind": str(_kind(semaphore)), "holders": [], "waiters": []}


def _shown(view: LockView) -> dict[str, Any]:
    return {"app": view.app, **output.plain(view.status)}
