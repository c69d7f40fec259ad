"""The app's own key-value store: the keys under ``kv.`` of its bucket, and no others.

What holds:

* :meth:`AppKV.get` asks the leader of the bucket's stream, so whatever was acknowledged anywhere before
  is seen. :meth:`~AppKV.keys`, :meth:`~AppKV.history` and watches read any replica: they may be some
  milliseconds behind.
* A write under a fence (``ctx.kv``) is refused by the server once another epoch leads: ``Fenced``.
* ``BusTimeout`` from a write means that its outcome is unknown. ``create`` and ``update`` mark what they
  write, look whether it was stored, and raise it only if they can't find out. Repeating a ``put``
  is harmless.
* Revisions are positions in the bucket's stream: they only grow, and no two writes share one.
"""

from __future__ import annotations

import asyncio
import math
import random
import secrets
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from phalanx.coord.codec import (
    Change,
    Entry,
    Removed,
    change_of,
    check_key,
    check_pattern,
    encode,
)
from phalanx.coord.kv_watch import KVWatch
from phalanx.errors import BusError, BusTimeout, ConfigError, Fenced, KeyExists, WrongRevision, WrongValue
from phalanx.names import Names
from phalanx.ports import Bus, Fence, Record

__all__ = ["AppKV", "Change", "Entry", "KVWatch", "Removed"]

T = TypeVar("T")

NONCE_HEADER = "Phalanx-Nonce"
"""Which call wrote a record: a lost reply is found again by it."""

HEADERS_BYTES = 512
"""Kept free for headers: the server's limit counts them too."""

MAX_TTL_SECONDS = 10 * 365 * 86400
PURGE_MARKER_SECONDS = 3600
"""How long a purge stays visible to those who watch. Nothing is left to come back after it."""

MAX_HISTORY = 256
REFUSALS = 10
"""How often a write is tried again that was refused although nothing speaks against it."""

_DELETE = {"KV-Operation": "DEL"}
_PURGE = {"KV-Operation": "PURGE", "Nats-Rollup": "sub"}
# Without the rollup, the value before would come back when this one's time is up.
_WITH_TTL = {"Nats-Rollup": "sub"}


class AppKV:
    """The KV of one app: ``app.kv`` anywhere, ``ctx.kv`` in an active section (then *fence* is given).

    Keys consist of a-z A-Z 0-9 - / _ = in parts separated by dots. Values are bytes (stored as they
    are), str (as UTF-8), or whatever msgspec can encode (as JSON); reading takes the type.

    All methods raise ConfigError for a wrong argument, BusUnavailable when nothing was done, BusTimeout
    when the outcome is unknown, and BusError for whatever else NATS refuses.
    """

    def __init__(
        self,
        bus: Bus,
        names: Names,
        app: str,
        *,
        fence: Callable[[], Fence] | None = None,
        epoch: Callable[[], int] | None = None,
    ) -> None:
        self._bus, self._names, self._app = bus, names, app
        self._fence, self._epoch = fence, epoch
        bucket = names.app_bucket(app)
        self._stream = names.bucket_stream(bucket)
        self._prefix = names.key_subject(bucket, "kv.")

    # --- reading

    @overload
    async def get(self, key: str) -> Entry[bytes] | None: ...
    @overload
    async def get(self, key: str, type: type[T]) -> Entry[T] | None: ...
    async def get(self, key: str, type: type[Any] = bytes) -> Entry[Any] | None:
        """The present value; None if there is none. Raises WrongValue if it is not of *type*."""
        record = await self._bus.read(self._stream, self._prefix + check_key(key))
        if record is None:
            return None
        change = change_of(record, key, type)
        return None if isinstance(change, Removed) else change

    async def value(self, key: str, type: type[T], default: T) -> T:
        """The present value itself, *default* if there is none. Raises WrongValue."""
        entry = await self.get(key, type)
        return default if entry is None else entry.value

    async def keys(self, prefix: str = "") -> list[str]:
        """All present keys that begin with *prefix*, sorted. It reads the values too, so not for huge
        buckets."""
        folder = prefix.rpartition(".")[0]
        if folder:
            check_key(folder, what="prefix")
        records = await self._bus.snapshot(self._stream, f"{self._prefix}{folder}{'.' if folder else ''}>")
        found = [r.subject.removeprefix(self._prefix) for r in records if not r.removed]
        return sorted(key for key in found if key.startswith(prefix))

    @overload
    async def history(self, key: str) -> list[Change[bytes]]: ...
    @overload
    async def history(self, key: str, type: type[T]) -> list[Change[T]]: ...
    async def history(self, key: str, type: type[Any] = bytes) -> list[Any]:
        """What the key held, oldest first, as far as the bucket keeps it (``kv_history``), removals too.

        A purge, and a write with a TTL, forget what was before. Raises WrongValue.
        """
        subject = self._prefix + check_key(key)
        records = await self._bus.read_log(self._stream, subject, limit=MAX_HISTORY)
        return [change_of(record, key, type) for record in records]

    @overload
    def watch(self, pattern: str = "") -> KVWatch[bytes]: ...
    @overload
    def watch(self, pattern: str, type: type[T]) -> KVWatch[T]: ...
    def watch(self, pattern: str = "", type: type[Any] = bytes) -> KVWatch[Any]:
        """The present state, then every change: ``async with kv.watch("users.>") as changes``.

        *pattern*: a key; ``*`` stands for one part, ``>`` at the end for all that follow; empty: all keys.
        Entering waits until the state was read: put a deadline around it where NATS may be away.
        """
        return KVWatch(self._bus, self._names, self._app, check_pattern(pattern), type)

    # --- writing

    async def put(self, key: str, value: object, *, ttl: float | None = None) -> int:
        """Store *value* whatever is there, and return its revision.

        *ttl*: after how many seconds the key vanishes, 1 to ten years, rounded up to whole seconds; the
        key's history is forgotten with such a write. Raises Fenced, WrongValue.
        """
        subject = self._prefix + check_key(key)
        data = self._data(key, value)
        # The plain case first: a put costs little more than NATS itself.
        if self._fence is None and ttl is None:
            return await self._bus.write(subject, data)
        return await self._store(subject, data, _ttl_headers(ttl), ttl)

    async def create(self, key: str, value: object, *, ttl: float | None = None) -> int:
        """Store *value* only where the key holds nothing (never did, or was removed); its revision.

        Raises KeyExists, Fenced, WrongValue. *ttl*: see :meth:`put`.
        """
        check_key(key)
        return await self._compare_and_set(key, self._data(key, value), None, _ttl_headers(ttl), ttl)

    async def update(self, key: str, value: object, revision: int, *, ttl: float | None = None) -> int:
        """Store *value* only if the key is at *revision* still; the new revision.

        Raises WrongRevision (``actual``: what the key is at), Fenced, WrongValue. *ttl*: see :meth:`put`;
        without one the key stays for ever, whatever ttl it had.
        """
        check_key(key)
        data = self._data(key, value)
        return await self._compare_and_set(key, data, _check_revision(revision), _ttl_headers(ttl), ttl)

    async def delete(self, key: str, *, revision: int | None = None) -> None:
        """Remove the key; its history stays. Harmless if it is not there.

        *revision*: only if the key is at it still, else WrongRevision. Raises Fenced.
        """
        check_key(key)
        if revision is None:
            await self._store(self._prefix + key, b"", _DELETE, None)
        else:
            await self._compare_and_set(key, b"", _check_revision(revision), _DELETE, None)

    async def purge(self, key: str) -> None:
        """Remove the key and its history. Raises Fenced."""
        await self._store(self._prefix + check_key(key), b"", _PURGE, PURGE_MARKER_SECONDS)

    # --- how

    def _data(self, key: str, value: object) -> bytes:
        data = value if type(value) is bytes else encode(value, key)
        if len(data) > (most := self._bus.max_payload - HEADERS_BYTES):
            raise WrongValue(
                key,
                f"the value has {len(data)} bytes, NATS takes {most} here",
                "store it in parts, or raise max_payload of the NATS servers",
            )
        return data

    async def _store(self, subject: str, data: bytes, headers: Mapping[str, str], ttl: float | None) -> int:
        fence = self._fence() if self._fence else None
        attempt = 0
        while True:
            try:
                return await self._bus.write(subject, data, fence=fence, headers=headers, ttl_seconds=ttl)
            except WrongRevision:
                await self._check_fence(fence)
                attempt += 1
                if fence is None or attempt > REFUSALS:
                    raise
            await _pause(attempt)

    async def _compare_and_set(
        self, key: str, data: bytes, revision: int | None, headers: Mapping[str, str], ttl: float | None
    ) -> int:
        """Write where the key is at *revision* (None: where it holds nothing)."""
        subject, nonce = self._prefix + key, secrets.token_hex(8)
        fence = self._fence() if self._fence else None
        headers = {**headers, NONCE_HEADER: nonce}
        expect, attempt = revision or 0, 0
        while True:
            try:
                return await self._bus.write(
                    subject, data, expect=expect, fence=fence, headers=headers, ttl_seconds=ttl
                )
            except BusTimeout:
                found = await self._find(subject, nonce)
                if found is None:
                    raise
                return found
            except WrongRevision:
                # It proves nothing about who wrote: the refused one may be a repetition of our own.
                record = await self._bus.read(self._stream, subject)
            if record is not None and record.headers.get(NONCE_HEADER) == nonce:
                return record.revision
            await self._check_fence(fence)
            actual = record.revision if record else 0
            if actual != expect and revision is not None:
                raise WrongRevision(key, revision, actual)
            if revision is None and record is not None and not record.removed:
                raise KeyExists(key, record.revision)
            expect, attempt = actual, attempt + 1
            if attempt > REFUSALS:
                raise WrongRevision(key, expect, actual)
            await _pause(attempt)

    async def _find(self, subject: str, nonce: str) -> int | None:
        """The revision of the write with that nonce, if it is the key's last one. None: unknown."""
        try:
            record: Record | None = await self._bus.read(self._stream, subject)
        except BusError:
            return None
        return record.revision if record and record.headers.get(NONCE_HEADER) == nonce else None

    async def _check_fence(self, fence: Fence | None) -> None:
        """Raise Fenced if the fence's key has changed; the server also refuses what merely collides."""
        if fence is None:
            return
        leader = await self._bus.read(self._stream, fence.subject)
        if leader is None or leader.revision != fence.revision:
            raise Fenced(self._app, self._epoch() if self._epoch else fence.revision)


async def _pause(attempt: int) -> None:
    await asyncio.sleep(random.uniform(0, 0.002 * attempt**2))


def _ttl_headers(ttl: float | None) -> Mapping[str, str]:
    if ttl is None:
        return {}
    number = isinstance(ttl, int | float) and not isinstance(ttl, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not number or not math.isfinite(ttl) or not 1 <= ttl <= MAX_TTL_SECONDS:
        raise ConfigError(
            "ttl", ttl, "is no time to live", f"give seconds from 1 to {MAX_TTL_SECONDS} (ten years)"
        )
    return _WITH_TTL


def _check_revision(revision: int) -> int:
    if not isinstance(revision, int) or isinstance(revision, bool) or revision < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            "revision", revision, "is no revision", "give the one of an entry; create() expects no key"
        )
    return revision
