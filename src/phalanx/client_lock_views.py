"""Locks and semaphores as an operator sees them, from outside of the nodes, and taking one away by force."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from phalanx.client_caller import caller, record
from phalanx.client_state import ended_sessions
from phalanx.coord.codec import check_key
from phalanx.coord.lock_body import Kind, decode_state, encode_state
from phalanx.coord.lock_key import RELEASED_KEPT_SECONDS
from phalanx.coord.lock_status import LockStatus, shown
from phalanx.decide.lock import Entry, LockState, taken_away
from phalanx.errors import ConfigError, WrongRevision
from phalanx.names import LEADER_KEY
from phalanx.ports import Record

if TYPE_CHECKING:
    from phalanx.client import PlatformClient


class LockView(msgspec.Struct, frozen=True):
    """A lock or semaphore that is held. ``app`` empty: it is the platform's."""

    app: str
    status: LockStatus


class LockReleased(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a release by force: who has lost it, with which token; ``successor``: the node that was
    granted it by that, empty if nobody waited."""

    app: str
    name: str
    kind: str
    node: str
    token: int
    successor: str = ""


class LockViews:
    """See :attr:`phalanx.client.PlatformClient.lock_views`. Every call raises BusError, and ConfigError for
    an app or a lock that there is not."""

    def __init__(self, client: PlatformClient) -> None:
        self._client = client

    async def held(self, app: str | None = None) -> list[LockView]:
        """All that are held: those of *app*; None: the platform's, and those of all apps."""
        if app:
            await self._client.check_app(app)
            apps: list[str] = [app]
        else:
            apps = ["", *await self._client.apps()]
        over = await ended_sessions(
            self._client.bus, self._client.names, await self._client.session_streams()
        )
        found = await asyncio.gather(*(self._held_of(each, over) for each in apps))
        return [
            LockView(each, status) for each, statuses in zip(apps, found, strict=True) for status in statuses
        ]

    async def show(self, name: str, app: str | None = None, *, kind: Kind = Kind.LOCK) -> LockView | None:
        """One, by the word of the stream's leader; None: nobody holds it."""
        found = await self._read(name, app or "", kind)
        over = await ended_sessions(
            self._client.bus, self._client.names, await self._client.session_streams()
        )
        if found is None:
            return None
        is_over = await self._is_over(app or "", [found], kind, over)
        status = shown(kind, name, decode_state(kind, found), is_over)
        return LockView(app or "", status) if status is not None else None

    async def release(
        self, name: str, app: str | None = None, *, kind: Kind = Kind.LOCK, token: int | None = None
    ) -> LockReleased:
        """Take it away from its holder (of a semaphore: the one with *token*), who learns that at once:
        whoever waits first has it then. Nobody looks whether the holder's code has stopped: what it protects
        is protected by tokens alone. Raises ConfigError where nobody holds it (with that token)."""
        while True:
            found = await self._read(name, app or "", kind)
            state = decode_state(kind, found) if found is not None else LockState()
            chosen = [each for each in state.holders if token is None or each.token == token]
            if found is None or not chosen:
                problem = f"nobody holds it{f' with token {token}' if token is not None else ''}"
                raise ConfigError(str(kind), name, problem, "see: phalanx lock list")
            if len(chosen) > 1:
                tokens = ", ".join(f"{each.token} ({each.session.node})" for each in chosen)
                raise ConfigError(
                    "--token", None, f"it has {len(chosen)} holders", f"choose one of: {tokens}"
                )
            over = await ended_sessions(
                self._client.bus, self._client.names, await self._client.session_streams()
            )
            is_over = await self._is_over(app or "", [found], kind, over)
            # This very holder, whatever happens meanwhile: it may release it, and somebody else have it.
            token = chosen[0].token
            wanted = taken_away(state, token, caller(), is_over)
            try:
                await self._client.bus.write(
                    found.subject,
                    encode_state(kind, wanted),
                    expect=found.revision,
                    ttl_seconds=RELEASED_KEPT_SECONDS if wanted.is_idle else None,
                )
            except WrongRevision:
                continue  # it has changed hands, or somebody came to wait
            return await self._told(name, app or "", kind, chosen[0], wanted)

    async def _told(self, name: str, app: str, kind: Kind, former: Entry, wanted: LockState) -> LockReleased:
        successor = next((each.session.node for each in wanted.holders if not each.token), "")
        done = LockReleased(
            app=app,
            name=name,
            kind=str(kind),
            node=former.session.node,
            token=former.token,
            successor=successor,
        )
        await record(
            self._client.bus,
            self._client.names,
            f"{kind}-taken-away",
            app=app,
            reason=f"{kind} {name} was held by {former.session} with token {former.token}",
            details={
                kind: name,
                "holder": str(former.session),
                "token": str(former.token),
                "next": successor,
            },
        )
        return done

    # --- reading

    def _bucket(self, app: str) -> str:
        names = self._client.names
        return names.app_bucket(app) if app else names.platform_bucket

    async def _read(self, name: str, app: str, kind: Kind) -> Record | None:
        check_key(name, what=str(kind))
        if app:
            await self._client.check_app(app)
        else:
            await self._client.apps()  # there is such a platform
        names, bucket = self._client.names, self._bucket(app)
        subject = names.key_subject(bucket, names.lock_key(str(kind), name))
        return await self._client.bus.read(names.bucket_stream(bucket), subject)

    async def _held_of(self, app: str, over: Callable[[str], bool]) -> list[LockStatus]:
        names, bucket = self._client.names, self._bucket(app)
        found: list[LockStatus] = []
        for kind in Kind:
            prefix = names.key_subject(bucket, names.lock_key(str(kind), ""))
            records = await self._client.bus.snapshot(names.bucket_stream(bucket), f"{prefix}>")
            is_over = await self._is_over(app, records, kind, over)
            for each in records:
                name = each.subject.removeprefix(prefix)
                if (status := shown(kind, name, decode_state(kind, each), is_over)) is not None:
                    found.append(status)
        return sorted(found, key=lambda each: (each.name, each.kind))

    async def _is_over(
        self, app: str, records: list[Record], kind: Kind, over: Callable[[str], bool]
    ) -> Callable[[Entry], bool]:
        epoch = 0
        states = [decode_state(kind, each) for each in records]
        if app and any(each.epoch for state in states for each in (*state.holders, *state.queue)):
            names, bucket = self._client.names, self._bucket(app)
            leader = await self._client.bus.read(
                names.bucket_stream(bucket), names.key_subject(bucket, LEADER_KEY)
            )
            epoch = leader.revision if leader is not None else 0
        return lambda entry: over(str(entry.session)) or 0 < entry.epoch < epoch


__all__ = ["LockReleased", "LockView", "LockViews"]
