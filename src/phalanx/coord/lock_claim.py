"""What locks stand on, on one node, and one wish to hold a lock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec

from phalanx import system
from phalanx.aio import Background
from phalanx.coord.noted_sessions import Judges
from phalanx.decide.lock import Entry
from phalanx.names import Names
from phalanx.ports import Bus, Fence
from phalanx.types import SessionId


class HoldingSession(Protocol):
    """What locks need of :class:`phalanx.coord.session.Session`."""

    @property
    def id(self) -> SessionId: ...
    @property
    def is_valid(self) -> bool: ...
    @property
    def valid_until(self) -> float: ...
    @property
    def lost_reason(self) -> str: ...
    def on_change(self, callback: Callable[[], None]) -> None: ...
    def off_change(self, callback: Callable[[], None]) -> None: ...


class Parts(msgspec.Struct, frozen=True):
    """What all locks of one app (None: of the platform itself) on one node share.

    ``mark``: how the nonces of claims begin that are made through it, so that it knows its own.
    """

    bus: Bus
    names: Names
    app: str | None
    session: HoldingSession
    register: Judges
    settling: Background
    mark: str = ""

    @property
    def bucket(self) -> str:
        """The app's bucket."""
        return self.names.app_bucket(self.app) if self.app is not None else self.names.platform_bucket

    @property
    def stream(self) -> str:
        """The stream behind it."""
        return self.names.bucket_stream(self.bucket)

    def subject(self, key: str) -> str:
        """Where a key of the bucket is stored."""
        return self.names.key_subject(self.bucket, key)


class Claim:
    """One wish to hold a permit, from when it is made until it was given up or lost.

    ``settled`` is set when it is granted, or has failed with ``error``; ``lost`` when what was granted is
    gone. *only_now*: it fails where it would have to wait.
    """

    def __init__(self, entry: Entry, fence: Fence | None, *, only_now: bool) -> None:
        self.entry, self.fence, self.only_now = entry, fence, only_now
        self.token = 0
        self.made_at = system.now()
        self.settled, self.lost = asyncio.Event(), asyncio.Event()
        self.lost_reason = ""
        self.error: Exception | None = None
        self.is_confirmed = False
        """Whether the write that granted it was fenced by its own epoch."""

    def grant(self, token: int, under: Fence | None) -> None:
        """It holds a permit from now on, by a write that was fenced so."""
        self.token, self.is_confirmed = token, under == self.fence
        self.settled.set()

    def fail(self, error: Exception) -> None:
        """It will not be granted."""
        self.error = error
        self.settled.set()

    @property
    def waits(self) -> bool:
        """Whether it is neither granted nor refused yet."""
        return not self.settled.is_set()

    @property
    def is_held(self) -> bool:
        """Whether it was granted and not lost since, as far as is known."""
        return bool(self.token) and not self.lost.is_set()


__all__ = ["Claim", "HoldingSession", "Parts"]
