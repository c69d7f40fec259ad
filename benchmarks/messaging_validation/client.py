"""``python -m benchmarks.messaging_validation.client NAME``: a process that is no node. It calls, and takes
the lock."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import sys

from benchmarks.messaging_validation.program import APP, LOCK, PLATFORM, RING, hold
from phalanx import CallError, Key, NatsOptions, PhalanxError
from phalanx.client import PlatformClient
from phalanx.testing.history import History

TIMEOUT_SECONDS = 10.0


async def calling(history: History, client: PlatformClient, who: str, app: str, method: str) -> None:
    """One call after the other, each with an id of its own."""
    api = client.api(app)
    while True:
        number = secrets.token_hex(8)
        history.record("called", who, app, id=number, method=method)
        try:
            if app == RING:
                epoch = await api.call(method, number, returns=int, to=Key(number), timeout=TIMEOUT_SECONDS)
            else:
                epoch = await api.call(method, number, returns=int, timeout=TIMEOUT_SECONDS)
        except CallError as error:
            history.record("failed", who, app, id=number, code=error.code, started=error.started)
        except PhalanxError as error:
            history.record("failed", who, app, id=number, code=type(error).__name__, started=True)
        else:
            history.record("answered", who, app, epoch, id=number, method=method)
        await asyncio.sleep(random.uniform(0, 0.01))


async def locking(history: History, client: PlatformClient, who: str) -> None:
    """The platform's lock, now and then."""
    while True:
        with contextlib.suppress(PhalanxError):
            async with client.lock(LOCK, timeout=10) as held:
                await hold(history, who, LOCK, held, random.uniform(0, 0.03))
        await asyncio.sleep(random.uniform(0, 0.1))


async def main() -> None:
    """Until it is killed."""
    given = json.loads(os.environ["PHALANX_TEST"])
    history, name = History(given["history"]), f"{sys.argv[1]}.{os.getpid()}"
    options = NatsOptions(urls=tuple(given["urls"]))
    async with PlatformClient(PLATFORM, options, timeout=30) as client, asyncio.TaskGroup() as tasks:
        for number in range(2):
            tasks.create_task(calling(history, client, f"{name}/place{number}", APP, "place"))
        tasks.create_task(calling(history, client, f"{name}/look", APP, "look"))
        tasks.create_task(calling(history, client, f"{name}/touch", RING, "touch"))
        tasks.create_task(locking(history, client, f"{name}/lock"))


if __name__ == "__main__":
    asyncio.run(main())
