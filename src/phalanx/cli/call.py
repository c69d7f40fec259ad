"""``phalanx call``: one call to an app, as another app would make it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.errors import ConfigError
from phalanx.messaging.routes import Any as AnyInstance
from phalanx.messaging.routes import Default, Key, Leader, Node, Route
from phalanx.types import is_dns_label

_WHERE = Where()


def call(
    app: Annotated[str, Parameter(help="The app to call.")],
    method: Annotated[str, Parameter(help="Which of its handlers.")],
    request: Annotated[str, Parameter(help="The request, as JSON.")] = "null",
    /,
    *,
    to: Annotated[
        str, Parameter(help="leader, any, the id of a node, key:KEY for a ring; else leader, for a pool any.")
    ] = "",
    wait: Annotated[float, Parameter(help="How long to wait for the answer, in seconds.")] = 5.0,
    idempotent: Annotated[
        bool, Parameter(help="It may be made again although it may have been carried out.")
    ] = False,
    where: Where = _WHERE,
) -> int:
    """Call a handler of an app and print its answer as JSON.

    A call to the leader waits through a failover. Needs a NATS login that may publish on the app's call
    subjects. Exit code 1 when the call failed or nobody answered in time, 2 for an unknown app or method and
    a request that is not of the declared type.
    """
    route, content = _route(to), _content(request)
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    answer = asyncio.run(_call(client, app, method, content, route, wait, idempotent or None))
    output.emit(answer, pretty=True)
    return exits.OK


def _route(to: str) -> Route:
    if not to:
        return Default
    if to == "leader":
        return Leader
    if to == "any":
        return AnyInstance
    if to.startswith("key:"):
        return Key(to.removeprefix("key:"))
    if not is_dns_label(to):
        problem = "neither leader nor any nor a node id nor key:KEY"
        raise ConfigError("--to", to, problem, "see: phalanx status")
    return Node(to)


def _content(request: str) -> object:
    try:
        return msgspec.json.decode(request)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError("JSON", request, str(error), "write JSON, such as '{\"id\": 7}'") from None


async def _call(
    client: PlatformClient,
    app: str,
    method: str,
    request: object,
    to: Route,
    wait: float,
    idempotent: bool | None,
) -> Any:
    try:
        async with client:
            return await client.api(app).call(method, request, to=to, timeout=wait, idempotent=idempotent)
    except ConfigError as error:
        if error.key == "timeout":
            raise ConfigError("--wait", error.value, error.problem, error.remedy) from None
        raise
