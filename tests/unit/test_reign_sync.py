"""What a barrier asks for while it is not known yet how many copies of the log NATS keeps."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.data import reign
from phalanx.data.reign import DataReign
from phalanx.errors import BusTimeout
from phalanx.types import Position


class Log:
    """A log whose state is known only when asked for the third time."""

    def __init__(self, replicas: int) -> None:
        self.replicas, self.asked = replicas, 0

    async def state(self) -> object:
        self.asked += 1
        if self.asked < 3:
            raise BusTimeout("STREAM.INFO", "no answer")
        return SimpleNamespace(replicas=self.replicas)


@pytest.mark.parametrize(("replicas", "needs"), [(1, True), (3, False)])
async def test_g3_nats_does_not_say_at_first_how_many_copies_it_keeps(
    replicas: int, needs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it does a standby's word is needed; and no section ends for it."""
    monkeypatch.setattr(reign, "REPLICAS_AGAIN_SECONDS", 0.0)
    asked: list[int] = []

    async def confirmed(*arguments: Any, **_: Any) -> None:
        asked.append(arguments[3])

    monkeypatch.setattr(reign, "confirmed", confirmed)
    log, lost = Log(replicas), list[str]()
    config = SimpleNamespace(sync="auto")
    database: Any = SimpleNamespace(
        config=config, log=log, app="a", on_lost=lost.append, bus=None, names=None
    )
    one: Any = DataReign(database, 3, kept=False)

    async def capture_sync(_: float) -> int:
        return 5

    async def shipped(*_: object) -> Position:
        return Position(9, 5)

    one._capture = SimpleNamespace(sync=capture_sync)
    one._shipper = SimpleNamespace(wait_shipped=shipped)
    one._starting = asyncio.create_task(asyncio.sleep(0))
    one._needs_standby = config.sync != "server"
    assert await one.sync(2) == Position(9, 5)
    assert asked == [9]
    await one._learn_replicas()
    await one.sync(2)
    assert asked == [9, 9] if needs else [9]
    assert not lost
