"""``phalanx switchover``: a planned hand-over that loses nothing, now or at a time."""

from __future__ import annotations

import asyncio
import re
from datetime import datetime
from typing import Annotated, NoReturn

from cyclopts import Parameter

from phalanx import system
from phalanx.cli import exits, output
from phalanx.cli.status import planned_text
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.client_operator import Switched
from phalanx.errors import ConfigError
from phalanx.types import PlannedSwitchover

_WHERE = Where()


def switchover(
    app: Annotated[str, Parameter(help="The app to hand over.")],
    /,
    *,
    to: Annotated[
        str | None, Parameter(help="The node that should take over; else the best standby.")
    ] = None,
    at: Annotated[
        str | None, Parameter(help="When: 13:37 today, or a time like 2025-05-01T13:37; else now.")
    ] = None,
    reason: Annotated[str, Parameter(help="Why, for the audit log.")] = "",
    cancel: Annotated[bool, Parameter(help="Call off the one that is planned.")] = False,
    wait: Annotated[float, Parameter(help="How long to wait for the next one, in seconds.")] = 60.0,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Hand an app over to another node, but only if nothing can be lost by it.

    It waits until the other node is active and has given a healthy answer. With `--at` it is stored in the
    platform and carried out by whichever node is active then: it needs no terminal, `status` and `why` show
    it, and `--cancel` calls it off. Exit code 1 when it is refused (nothing was changed) or nobody took over,
    2 for an unknown app, a node that cannot take over, or a time in the past.
    """
    check_wait(wait)
    moment = moment_ahead(at, system.wall()) if at is not None else None
    if cancel and (at is not None or to is not None):
        raise ConfigError("--cancel", None, "goes with neither --at nor --to", "leave them out")
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    try:
        if cancel:
            return _cancel(client, app, json=json)
        if moment is not None:
            return _plan(client, app, moment, to, reason, json=json)
        done = asyncio.run(_switch(client, app, to, reason, wait))
    except ConfigError as error:
        raise by_option(error) from None
    show(done, json=json)
    return exits.OK


async def _switch(client: PlatformClient, app: str, to: str | None, reason: str, wait: float) -> Switched:
    async with client:
        return await client.operator.switchover(app, to, reason=reason, timeout=wait)


def _plan(client: PlatformClient, app: str, at: float, to: str | None, reason: str, *, json: bool) -> int:
    async def plan() -> PlannedSwitchover:
        async with client:
            return await client.operator.plan_switchover(app, at, to, reason=reason)

    planned = asyncio.run(plan())
    if json:
        output.emit(msgspec_all(planned), pretty=True)
    else:
        output.say(f"{app}: {planned_text(planned)}; call it off: phalanx switchover {app} --cancel")
    return exits.OK


def _cancel(client: PlatformClient, app: str, *, json: bool) -> int:
    async def cancel() -> PlannedSwitchover | None:
        async with client:
            return await client.operator.cancel_switchover(app)

    planned = asyncio.run(cancel())
    if json:
        output.emit({"app": app, "cancelled": planned is not None}, pretty=True)
    elif planned is None:
        output.say(f"{app}: no switchover is planned")
    else:
        output.say(f"{app}: called off: {planned_text(planned)}")
    return exits.OK if planned is not None else exits.NO


def msgspec_all(planned: PlannedSwitchover) -> dict[str, object]:
    """All fields, also those that have their default."""
    return {field: getattr(planned, field) for field in planned.__struct_fields__}


def show(done: Switched, *, json: bool) -> None:
    """Who took over, and after how long."""
    if json:
        output.emit(done, pretty=True)
        return
    healthy = done.healthy_seconds - done.seconds
    output.say(
        f"{done.app}: ",
        (done.active, "bold green"),
        f" took over from {done.previous or 'nobody'} after {output.span(done.seconds)} (epoch {done.epoch})",
        f", healthy {output.span(healthy)} later" if healthy >= 0.01 else "",
    )
    if done.left_behind:
        output.say(
            (
                f"{done.app}: the database of {done.previous} was not put into the log to its end: ",
                "bold red",
            ),
            (f"{done.left_behind}; see phalanx db diverged {done.app}", "bold red"),
        )


def check_wait(wait: float) -> None:
    """Raises ConfigError."""
    if not 0.1 <= wait <= 86400:
        raise ConfigError("--wait", wait, "out of range", "choose 0.1 to 86400 seconds")


def by_option(error: ConfigError) -> ConfigError:
    """The error as it is called on the command line."""
    option = {"node": "--to", "at": "--at"}.get(error.key)
    return ConfigError(option, error.value, error.problem, error.remedy) if option else error


def moment_ahead(text: str, now: float) -> float:
    """Unix seconds of ``13:37`` (or ``13:37:30``; today, local time) or of an ISO time. Raises ConfigError,
    also for a moment that has passed, and for a local time that a change of the clocks skips or repeats."""
    text = text.strip()
    try:
        if re.fullmatch(r"[0-9]{1,2}:[0-9]{2}(:[0-9]{2})?", text):
            hour, minute, *rest = (int(part) for part in text.split(":"))
            today = datetime.fromtimestamp(now)  # without an offset: that of now may not be that of then
            found = today.replace(hour=hour, minute=minute, second=rest[0] if rest else 0, microsecond=0)
        else:
            found = datetime.fromisoformat(text)
        moment = found.timestamp()
        other = found.replace(fold=1).timestamp()
    except (ValueError, OverflowError, OSError):
        raise ConfigError("--at", text, "not a time", "write 13:37 or 2025-05-01T13:37") from None
    if moment != other:
        _refuse_changed(text, moment, other)
    if moment <= now:
        problem = f"is in the past: it is {output.clock(now)}"
        raise ConfigError("--at", text, problem, "choose a later time, tomorrow's with its date")
    return moment


def _refuse_changed(text: str, one: float, other: float) -> NoReturn:
    """A local time when the clocks change, by PEP 495: read with either offset it is two moments."""
    # In an hour that is skipped the later fold is the earlier moment; it is shown by the clock as it is then.
    moments = [datetime.fromtimestamp(each).astimezone() for each in sorted((one, other))]
    choice = " or ".join(each.isoformat() for each in moments)
    if other < one:
        raise ConfigError("--at", text, "is skipped that day: the clocks go forward", f"write {choice}")
    raise ConfigError("--at", text, "comes twice that day: the clocks go back", f"write {choice}")
