"""What operators see of events: durable consumers, and how far behind they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from phalanx import system
from phalanx.errors import BusError, ConfigError
from phalanx.ports import STREAM_NOT_FOUND

if TYPE_CHECKING:
    from phalanx.client import PlatformClient


class ConsumerView(msgspec.Struct, frozen=True, kw_only=True):
    """One durable consumer. ``app``: whose handler it is; ``stream``: whose events it handles, ``_``: the
    platform's. ``pending``: events that it has not seen; ``unacknowledged``: delivered and not done.
    ``lag_seconds``: the age of the oldest pending event. ``missed``: the sequences between which events were
    dropped before it saw them, empty if none were."""

    app: str
    durable: str
    stream: str
    pattern: str
    pending: int
    unacknowledged: int
    redelivered: int
    lag_seconds: float
    dead: int
    missed: tuple[int, ...] = ()


class EventOperations:
    """Made by ``PlatformClient.event_operations``."""

    def __init__(self, client: PlatformClient) -> None:
        self._client = client

    async def check_there(self, app: str | None) -> None:
        """Raises ConfigError for an app that has no events of its own."""
        if await self._stream_info(app) is None:
            raise ConfigError(
                "app", app or "_", "it has no events of its own", "declare them: events=Events()"
            )

    async def check_durable(self, app: str | None, durable: str) -> None:
        """Raises ConfigError where *app* (None: any) has no such durable consumer."""
        known = sorted({view.durable for view in await self.consumers() if app in (None, view.app)})
        if durable not in known:
            remedy = f"choose from: {', '.join(known)}" if known else "there are none"
            raise ConfigError("--durable", durable, "no such durable consumer", remedy)

    async def consumers(self, app: str | None = None) -> list[ConsumerView]:
        """All durable consumers; *app*: of that app's events, ``_``: of the platform's. Raises BusError."""
        if app is None:
            of: list[str | None] = [*(await self._client.apps()), None]
        else:
            of = [None if app == "_" else app]
        counts = await self._dead()
        found: list[ConsumerView] = []
        for each in of:
            found += await self._of_stream(each, counts)
        return sorted(found, key=lambda view: (view.stream, view.app, view.durable))

    async def _of_stream(self, app: str | None, dead: dict[tuple[str, str], int]) -> list[ConsumerView]:
        info = await self._stream_info(app)
        if info is None:
            return []
        bus, names = self._client.bus, self._client.names
        stream, first = names.events_stream(app), int(info["state"]["first_seq"])
        found: list[ConsumerView] = []
        while True:
            page = await bus.api(f"CONSUMER.LIST.{stream}", {"offset": len(found)})
            for consumer in page.get("consumers") or ():
                found.append(await self._view(app, consumer, first, dead))
            if not page.get("consumers") or len(found) >= int(page.get("total", 0)):
                return found

    async def _view(
        self, app: str | None, consumer: dict[str, Any], first: int, dead: dict[tuple[str, str], int]
    ) -> ConsumerView:
        config: dict[str, Any] = consumer["config"]
        name, seen, pending = (
            str(consumer["name"]),
            int(consumer["delivered"]["stream_seq"]),
            consumer["num_pending"],
        )
        owner, _, durable = name.rpartition("_")
        owner = owner or app or "?"
        subjects = config.get("filter_subjects") or [config.get("filter_subject", ">")]
        lag = await self._age_of_next(app, subjects[0], seen) if pending else 0.0
        return ConsumerView(
            app=owner,
            durable=durable,
            stream=app or "_",
            pattern=", ".join(self._client.names.event_of(subject) for subject in subjects),
            pending=pending,
            unacknowledged=consumer["num_ack_pending"],
            redelivered=consumer["num_redelivered"],
            lag_seconds=lag,
            dead=dead.get((owner, durable), 0),
            missed=(seen + 1, first - 1) if 0 < seen < first - 1 else (),
        )

    async def _age_of_next(self, app: str | None, subject: str, seen: int) -> float:
        stream = self._client.names.events_stream(app)
        page = await self._client.bus.read_log(stream, subject, start=seen + 1, limit=1)
        return max(0.0, system.wall() - page[0].time) if page else 0.0

    async def _dead(self) -> dict[tuple[str, str], int]:
        counts: dict[tuple[str, str], int] = {}
        try:
            async for letter in self._client.dead_letters.list():
                counts[letter.app, letter.durable] = counts.get((letter.app, letter.durable), 0) + 1
        except BusError as error:
            if error.code != STREAM_NOT_FOUND:
                raise
        return counts

    async def _stream_info(self, app: str | None) -> dict[str, Any] | None:
        stream = self._client.names.events_stream(app)
        try:
            return await self._client.bus.api(f"STREAM.INFO.{stream}", {})
        except BusError as error:
            if error.code == STREAM_NOT_FOUND:
                return None
            raise
