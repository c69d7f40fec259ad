"""``phalanx recreate-bucket``: what an operator does when an app's bucket is gone for good."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from cyclopts import Parameter

from phalanx.bus import provision
from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.errors import ConfigError

_WHERE = Where()


def recreate_bucket(
    app: Annotated[str, Parameter(help="The app whose bucket is gone.")],
    /,
    *,
    history: Annotated[int, Parameter(help="The app's kv_history.")] = 8,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON.")] = False,
) -> int:
    """Make the vanished bucket of an app anew, empty, above all earlier epochs.

    Its KV and locks are lost. Nodes never do this by themselves: a bucket that is gone is a loss of data, or
    the wrong NATS. Stop the nodes that have the app first. Exit code 2 when the bucket is there.
    """
    if not 1 <= history <= 64:
        raise ConfigError("--history", history, "out of range", "choose 1 to 64, as in the app's kv_history")
    platform, nats = where.find()
    # Milliseconds since 1970 are more than any bucket has counted writes, and so than any epoch.
    first = int(time.time() * 1000)
    asyncio.run(_recreate(PlatformClient(platform, nats, timeout=where.timeout), app, history, first))
    if json:
        output.emit({"app": app, "epochs_above": first}, pretty=True)
    else:
        output.say(f"{app}: made anew, empty; its next epoch is above {first}")
    return exits.OK


async def _recreate(client: PlatformClient, app: str, history: int, first: int) -> None:
    async with client:
        known = await client.apps()
        if app not in known:
            raise ConfigError("app", app, "not an app of this platform", f"known are: {', '.join(known)}")
        bus, names = client.bus, client.names
        bucket = names.app_bucket(app)
        if await provision.stream_info(bus, names.bucket_stream(bucket)) is not None:
            raise ConfigError("app", app, f"its bucket {bucket} is there", "nothing has to be made anew")
        replicas = provision.wanted_replicas(bus, None)
        config = provision.bucket_config(names, bucket, app, history=history, replicas=replicas)
        await provision.create_stream(bus, {**config, "first_seq": first})
