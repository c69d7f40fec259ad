"""``phalanx events``: events as they come, publishing one, who handles them, and what nobody could handle."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter

from phalanx import system
from phalanx.cli import exits, output
from phalanx.cli.audit import moment
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.client_events import ConsumerView
from phalanx.errors import ConfigError, EventError
from phalanx.messaging.content import ContentError
from phalanx.messaging.dead_letters import DeadLetter
from phalanx.messaging.event import Event

events = App(name="events", help="Events of an app, or of the whole platform.")
dead = App(name="dead", help="Dead letters: events that a handler could not handle.")
events.command(dead)

_WHERE = Where()
PLATFORM = "_"
"""In place of an app: the events of the whole platform."""


def _app(app: str) -> str | None:
    return None if app == PLATFORM else app


@events.command
def tail(
    app: Annotated[str, Parameter(help="The app; _ for the events of the platform.")] = PLATFORM,
    /,
    *,
    subject: Annotated[str, Parameter(help="Only these: user.created, user.*, user.>")] = ">",
    since: Annotated[
        str | None,
        Parameter(help="First those from then on: 90s, 10m, 2h, 7d, or a time like 2025-05-01T12:00."),
    ] = None,
    limit: Annotated[int | None, Parameter(help="End after so many.")] = None,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON, one object a line.")] = False,
) -> int:
    """Show events as they come, until Ctrl-C."""
    if limit is not None and limit < 1:
        raise ConfigError("--limit", limit, "out of range", "choose 1 or more")
    start = moment(since, system.wall()) if since is not None else None
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    asyncio.run(_tail(client, _app(app), subject, start, limit, json))
    return exits.OK


async def _tail(
    client: PlatformClient, app: str | None, subject: str, since: float | None, limit: int | None, json: bool
) -> None:
    async with client:
        if app is not None:
            await client.check_app(app)
        reader = client.events(app).subscribe(subject, since=since)
        async with contextlib.aclosing(reader):
            shown = 0
            while limit is None or shown < limit:
                try:
                    _show(await anext(reader), json)
                except EventError as error:
                    output.note(f"error: {error}")
                shown += 1


def _show(event: Event[Any], json: bool) -> None:
    if json:
        output.emit(
            {
                "sequence": event.sequence,
                "time": event.time,
                "subject": event.subject,
                "key": event.key,
                "data": event.data,
                "headers": dict(event.headers),
            }
        )
        return
    key = f"  key={event.key}" if event.key else ""
    output.say(
        (output.clock(event.time), "dim"),
        f"  {event.sequence}  ",
        (event.subject, "bold"),
        (key, "dim"),
        f"  {msgspec.json.encode(event.data).decode()}",
    )


@events.command
def publish(
    app: Annotated[str, Parameter(help="The app; _ for the events of the platform.")],
    subject: Annotated[str, Parameter(help="Of the event, such as user.created.")],
    data: Annotated[str, Parameter(help="As JSON.")] = "null",
    /,
    *,
    key: Annotated[str, Parameter(help="Events of one key are handled in order.")] = "",
    id: Annotated[str | None, Parameter(help="Stored once, if published again within two minutes.")] = None,
    wait: Annotated[float, Parameter(help="How long to try, in seconds.")] = 5.0,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Publish one event. Not fenced: whoever leads the app."""
    try:
        content = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError("JSON", data, str(error), "write JSON, such as '{\"id\": 7}'") from None
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    sequence = asyncio.run(_publish(client, _app(app), subject, content, key, id, wait))
    if json:
        output.emit({"subject": subject, "sequence": sequence}, pretty=True)
    else:
        output.say(f"{subject}: sequence ", (str(sequence), "bold"))
    return exits.OK


async def _publish(
    client: PlatformClient,
    app: str | None,
    subject: str,
    data: object,
    key: str,
    message_id: str | None,
    wait: float,
) -> int:
    async with client:
        if app is not None:
            await client.check_app(app)
        await client.event_operations.check_there(app)
        try:
            return await client.events(app).publish(
                subject, data, key=key, message_id=message_id, timeout=wait
            )
        except ConfigError as error:
            if error.key == "timeout":
                raise ConfigError("--wait", error.value, error.problem, error.remedy) from None
            raise


@events.command
def consumers(
    app: Annotated[str | None, Parameter(help="The app; _ for the platform; else all.")] = None,
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Show durable consumers: how many events wait, are under way, were delivered again; the age of the next.

    Exit code 1 when one may have missed events that were dropped before it saw them.
    """
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    found = asyncio.run(_consumers(client, app))
    if json:
        output.emit({"platform": platform, "consumers": found}, pretty=True)
    elif not found:
        output.say("no durable consumers")
    else:
        heads = (
            "of",
            "durable",
            "events",
            "pending",
            "unacknowledged",
            "redelivered",
            "lag",
            "dead",
            "missed",
        )
        output.table(heads, [_row(view) for view in found])
    return exits.NO if any(view.missed for view in found) else exits.OK


async def _consumers(client: PlatformClient, app: str | None) -> list[ConsumerView]:
    async with client:
        if app is not None and app != PLATFORM:
            await client.check_app(app)
        return await client.event_operations.consumers(app)


def _row(view: ConsumerView) -> tuple[str, ...]:
    return (
        view.stream,
        view.durable,
        view.pattern,
        str(view.pending),
        str(view.unacknowledged),
        str(view.redelivered),
        output.span(view.lag_seconds),
        str(view.dead),
        f"{view.missed[0]}-{view.missed[1]}" if view.missed else "",
    )


# --- dead letters


@dead.command(name="list")
def list_(
    app: Annotated[str | None, Parameter(help="The app; else all.")] = None,
    /,
    *,
    durable: Annotated[str | None, Parameter(help="Of this durable consumer alone.")] = None,
    limit: Annotated[int, Parameter(help="The oldest so many.")] = 100,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Show the events that were given up, oldest first, with the number by which to show or retry one."""
    if not 1 <= limit <= 100_000:
        raise ConfigError("--limit", limit, "out of range", "choose 1 to 100000")
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    letters = asyncio.run(_list(client, app, durable, limit))
    if json:
        output.emit({"platform": platform, "dead": [_plain(letter) for letter in letters]}, pretty=True)
    elif not letters:
        output.say("no dead letters")
    else:
        heads = ("number", "given up", "app", "durable", "event", "key", "tries", "reason")
        output.table(heads, [_dead_row(letter) for letter in letters])
    return exits.OK


async def _list(client: PlatformClient, app: str | None, durable: str | None, limit: int) -> list[DeadLetter]:
    async with client:
        if app is not None:
            await client.check_app(app)
        if durable is not None:
            await client.event_operations.check_durable(app, durable)
        found: list[DeadLetter] = []
        async for letter in client.dead_letters.list(app, durable):
            found.append(letter)
            if len(found) == limit:
                break
        return found


def _dead_row(letter: DeadLetter) -> tuple[str, ...]:
    return (
        str(letter.number),
        output.clock(letter.time),
        letter.app,
        letter.durable,
        letter.subject,
        letter.key,
        str(letter.attempts),
        letter.reason,
    )


def _plain(letter: DeadLetter) -> dict[str, Any]:
    """As JSON: the event's content where it is JSON or MessagePack, else its text."""
    try:
        data = letter.content()
    except ContentError:
        data = letter.data.decode(errors="replace")
    shown = {field: getattr(letter, field) for field in letter.__struct_fields__}
    return {**shown, "data": data}


@dead.command
def show(
    number: Annotated[int, Parameter(help="As `events dead list` shows it.")],
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON, which it is in any case.")] = False,
) -> int:
    """Show one dead letter with its data and headers, as JSON."""
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    output.emit(_plain(asyncio.run(_get(client, number))), pretty=True)
    return exits.OK


async def _get(client: PlatformClient, number: int) -> DeadLetter:
    async with client:
        return await client.dead_letters.get(number)


@dead.command
def retry(
    *numbers: Annotated[int, Parameter(help="As `events dead list` shows them.")],
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON, one object a line.")] = False,
) -> int:
    """Publish events again, for the handler alone that gave them up, and delete their dead letters."""
    _given(numbers)
    platform, nats = where.find()
    asyncio.run(_retry(PlatformClient(platform, nats, timeout=where.timeout), numbers, json))
    return exits.OK


async def _retry(client: PlatformClient, numbers: tuple[int, ...], json: bool) -> None:
    async with client:
        for number in numbers:
            sequence = await client.dead_letters.retry(number)
            if json:
                output.emit({"number": number, "sequence": sequence})
            else:
                output.say(f"{number}: published again, sequence {sequence}")


@dead.command
def delete(
    *numbers: Annotated[int, Parameter(help="As `events dead list` shows them.")],
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON, one object a line.")] = False,
) -> int:
    """Delete dead letters for good."""
    _given(numbers)
    platform, nats = where.find()
    asyncio.run(_delete(PlatformClient(platform, nats, timeout=where.timeout), numbers, json))
    return exits.OK


async def _delete(client: PlatformClient, numbers: tuple[int, ...], json: bool) -> None:
    async with client:
        for number in numbers:
            letter = await client.dead_letters.delete(number)
            if json:
                output.emit({"number": number, "deleted": _plain(letter)})
            else:
                output.say(f"{number}: deleted ({letter.subject} of {letter.app}/{letter.durable})")


def _given(numbers: tuple[int, ...]) -> None:
    if not numbers:
        raise ConfigError("NUMBER", "", "none is given", "see: phalanx events dead list")
