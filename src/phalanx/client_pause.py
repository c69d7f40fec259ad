"""Pausing and resuming, from outside of the nodes: a key in the platform's bucket, and who knows of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from phalanx import system
from phalanx.client_caller import caller, record
from phalanx.client_state import decoded
from phalanx.client_views import NodeView
from phalanx.decide.pause import WHOLE_PLATFORM
from phalanx.errors import ConfigError, WrongRevision
from phalanx.types import Pause

if TYPE_CHECKING:
    from phalanx.client import PlatformClient

PAUSE_SEEN_SECONDS = 2.0
"""How long a pause waits for the nodes to learn of it."""

_POLL_SECONDS = 0.05


class PauseDone(msgspec.Struct, frozen=True, kw_only=True):
    """What came of pausing or resuming *app* (empty: the platform).

    ``pause``: what holds now, or was ended; ``changed``: False if it was so before. ``unaware``: live nodes
    that have not said within two seconds that they know it. ``unkept``: what is active now and would end with
    its node in spite of the pause: app, node, why.
    """

    app: str
    pause: Pause
    changed: bool
    unaware: tuple[str, ...] = ()
    unkept: tuple[tuple[str, str, str], ...] = ()


class PauseClient:
    """See :meth:`phalanx.client.PlatformClient.pause` and ``resume``."""

    def __init__(self, client: PlatformClient) -> None:
        self._client = client

    async def pause(self, app: str | None, reason: str) -> PauseDone:
        """Pause *app*, None: the platform."""
        return await self._set_pause(app, Pause(caller(), system.wall(), reason), "paused")

    async def resume(self, app: str | None) -> PauseDone | None:
        """End its pause; None if it was not paused."""
        pauses = await self._client.pauses()
        if app is not None and app not in pauses and WHOLE_PLATFORM in pauses:
            await self._client.check_app(app)
            raise ConfigError("app", app, "not paused by itself: the whole platform is", "phalanx resume")
        if (pause := pauses.get(app or WHOLE_PLATFORM)) is None:
            if app is not None:
                await self._client.check_app(app)
            return None
        return await self._set_pause(app, pause, "resumed")

    async def _set_pause(self, app: str | None, pause: Pause, action: str) -> PauseDone:
        if app is not None and action == "paused":
            await self._client.check_app(app)
        names, key = self._client.names, app or WHOLE_PLATFORM
        subject = names.key_subject(names.platform_bucket, names.pause_key(key))
        stream = names.bucket_stream(names.platform_bucket)
        while True:
            await self._client.pauses()  # there is such a platform
            there = await self._client.bus.read(stream, subject)
            held = None if there is None or there.removed else decoded(there, Pause)
            if (held is not None) is (action == "paused"):
                unkept = _unkept(await self._client.nodes(), key) if held is not None else ()
                return PauseDone(app=key, pause=held or pause, changed=False, unkept=unkept)
            expect = there.revision if there is not None else 0
            try:
                if action == "paused":
                    await self._client.bus.write(subject, msgspec.json.encode(pause), expect=expect)
                else:
                    await self._client.bus.write(subject, expect=expect, headers={"KV-Operation": "DEL"})
                break
            except WrongRevision:
                continue  # somebody else did the same, or the opposite
        details = {} if action == "paused" else {"paused_by": pause.by}
        await record(self._client.bus, names, action, app=key, reason=pause.reason, details=details)
        if action != "paused":
            return PauseDone(app=key, pause=pause, changed=True)
        unaware, unkept = await self._aware(key)
        return PauseDone(app=key, pause=pause, changed=True, unaware=unaware, unkept=unkept)

    async def _aware(self, app: str) -> tuple[tuple[str, ...], tuple[tuple[str, str, str], ...]]:
        """See PauseDone: ``unaware``, ``unkept``."""
        deadline = system.now() + PAUSE_SEEN_SECONDS
        while True:
            nodes = [view for view in await self._client.nodes(0.5) if view.is_live]
            unaware = tuple(view.node for view in nodes if not _knows(view, app))
            if not unaware or system.now() >= deadline:
                return unaware, _unkept(nodes, app)
            await asyncio.sleep(_POLL_SECONDS)


def _knows(view: NodeView, app: str) -> bool:
    if view.status is None:
        return False
    return all(each.pause is not None for each in view.status.apps if app in ("", each.name))


def _unkept(nodes: Iterable[NodeView], app: str) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (each.name, view.node, each.unkept)
        for view in nodes
        if view.status is not None
        for each in view.status.apps
        if each.unkept and app in ("", each.name)
    )


__all__ = ["PauseClient", "PauseDone"]
