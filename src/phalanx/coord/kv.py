"""The app's own key-value store: the keys under ``kv.`` of its bucket, and no others.

What holds:

* :meth:`AppKV.get` asks the leader of the bucket's stream, so whatever was acknowledged anywhere before
  is seen, unless that leader was deposed and does not know yet; with ``linearizable`` not even then.
  :meth:`~AppKV.get_many`, :meth:`~AppKV.keys`, :meth:`~AppKV.history` and watches read any replica: they may
  be some milliseconds behind. docs/kv-and-locks.md has a table.
* A write under a fence (``ctx.kv``) is refused by the server once another epoch leads: ``Fenced``.
* ``BusTimeout`` from a write means that its outcome is unknown. ``create`` and ``update`` mark what they
  write, look whether it was stored, and raise it only if they can't find out. Repeating a ``put`` or
  ``put_many`` is harmless.
* Revisions are positions in the bucket's stream: they only grow, and no two writes share one.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from phalanx.coord.kv_read import HEADERS_BYTES, REFUSALS, Reads, pause
from phalanx.coord.kv_watch import KVWatch
from phalanx.errors import (
    BusError,
    BusTimeout,
    BusUnavailable,
    ConfigError,
    Fenced,
    KeyExists,
    WrongRevision,
    WrongValue,
)
from phalanx.names import FENCE_KEY, Names
from phalanx.ports import BATCHES_UNDER_WAY, MAX_BATCH, Bus, Fence, Record, Write

__all__ = ["AppKV", "Change", "Entry", "KVWatch", "Removed"]

T = TypeVar("T")

NONCE_HEADER = "Phalanx-Nonce"
"""Which call wrote a record: a lost reply is found again by it."""

MAX_TTL_SECONDS = 10 * 365 * 86400
PURGE_MARKER_SECONDS = 3600
"""How long a purge stays visible to those who watch. Nothing is left to come back after it."""

MAX_HISTORY = 256
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
        self._barrier = names.key_subject(bucket, FENCE_KEY)
        self._reads = Reads(bus, self._stream, self._barrier)

    # --- reading

    @overload
    async def get(self, key: str, *, linearizable: bool = False) -> Entry[bytes] | None: ...
    @overload
    async def get(self, key: str, type: type[T], *, linearizable: bool = False) -> Entry[T] | None: ...
    async def get(
        self, key: str, type: type[Any] = bytes, *, linearizable: bool = False
    ) -> Entry[Any] | None:
        """The present value; None if there is none. Raises WrongValue if it is not of *type*.

        *linearizable*: it is the value at a moment during this call, whichever server answers. It costs
        about one round trip and one small write more, and needs a majority of the servers, as a write does.
        """
        subject = self._prefix + check_key(key)
        if linearizable:
            record = (await self._reads.now([subject])).get(subject)
        else:
            record = await self._bus.read(self._stream, subject)
        return _present(record, key, type)

    @overload
    async def get_many(
        self, keys: Iterable[str], *, linearizable: bool = False
    ) -> dict[str, Entry[bytes]]: ...
    @overload
    async def get_many(
        self, keys: Iterable[str], type: type[T], *, linearizable: bool = False
    ) -> dict[str, Entry[T]]: ...
    async def get_many(
        self, keys: Iterable[str], type: type[Any] = bytes, *, linearizable: bool = False
    ) -> dict[str, Entry[Any]]:
        """The values of up to 1000 *keys* as they were at one moment, by key; those that hold none are not in
        it. So a :meth:`put_many` is seen wholly or not at all.

        Any replica answers, so that moment may be some milliseconds ago; with *linearizable* it lies within
        this call (see :meth:`get`). Raises WrongValue.
        """
        subjects = [self._prefix + key for key in self._check_keys(keys)]
        if not subjects:
            return {}
        read = self._reads.now if linearizable else self._reads.lately
        records = await read(subjects)
        found: dict[str, Entry[Any]] = {}
        for subject in subjects:
            key = subject.removeprefix(self._prefix)
            if (entry := _present(records.get(subject), key, type)) is not None:
                found[key] = entry
        return found

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
        records: list[Record] = []
        # An answer has a limit in bytes, too.
        while page := await self._bus.read_log(
            self._stream, subject, start=records[-1].revision + 1 if records else 1, limit=MAX_HISTORY
        ):
            records += page
        return [change_of(record, key, type) for record in records]

    @overload
    def watch(self, pattern: str = "", *, since: int | None = None) -> KVWatch[bytes]: ...
    @overload
    def watch(self, pattern: str, type: type[T], *, since: int | None = None) -> KVWatch[T]: ...
    def watch(self, pattern: str = "", type: type[Any] = bytes, *, since: int | None = None) -> KVWatch[Any]:
        """The present state, then every change: ``async with kv.watch("users.>") as changes``.

        *pattern*: a key; ``*`` stands for one part, ``>`` at the end for all that follow; empty: all keys.
        *since*: no state, but every change after that revision (0: from the beginning), in order. Raises
        RevisionCompacted on entering, or later, if some of them may be gone: that is when a key was changed
        ``kv_history`` times or more since. What a purge or a write with a TTL has replaced is not missed, and
        not given either. See :class:`KVWatch`.
        Entering waits until the state was read: put a deadline around it where NATS may be away.
        """
        if since is not None and since != 0:
            _check_revision(since, what="since")
        return KVWatch(self._bus, self._names, self._app, check_pattern(pattern), type, since)

    async def revision(self) -> int:
        """The bucket's last revision: whatever was acknowledged before has no larger one, whatever is written
        later has. Writes once, as ``get(…, linearizable=True)`` does."""
        return await self._bus.write(self._barrier)

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

    async def put_many(self, values: Mapping[str, object], *, ttl: float | None = None) -> dict[str, int]:
        """Store all *values* (up to 1000, by key) or none, whatever is there; the revisions, by key.

        *ttl*: see :meth:`put`. Raises Fenced, WrongValue. After BusTimeout either all are there or none.
        """
        keys = self._check_keys(values)
        headers = _ttl_headers(ttl)
        writes = [Write(self._prefix + key, self._data(key, values[key]), headers, ttl) for key in keys]
        if not writes:
            return {}
        last = await self._store_many(writes)
        return dict(zip(keys, range(last - len(keys) + 1, last + 1), strict=True))

    async def delete_many(self, keys: Iterable[str]) -> None:
        """Remove all of up to 1000 *keys* or none; their history stays. Harmless for those that are not
        there. Raises Fenced."""
        writes = [Write(self._prefix + key, b"", _DELETE) for key in self._check_keys(keys)]
        if writes:
            await self._store_many(writes)

    # --- how

    def _check_keys(self, keys: Iterable[str]) -> Sequence[str]:
        """*keys* in their order, each once. Raises ConfigError."""
        if isinstance(keys, str | bytes):
            raise ConfigError("keys", keys, "is one key", "give a list of keys")
        checked = list(dict.fromkeys(check_key(key) for key in keys))
        if len(checked) > MAX_BATCH:
            raise ConfigError(
                "keys", len(checked), "are too many at once", f"NATS takes {MAX_BATCH}: do it in parts"
            )
        return checked

    async def _store_many(self, writes: Sequence[Write]) -> int:
        fence = self._fence() if self._fence else None
        attempt = 0
        while True:
            try:
                return await self._bus.write_many(writes, fence=fence)
            except WrongRevision:
                await self._check_fence(fence)
                if fence is None or attempt >= REFUSALS:
                    raise
            except BusUnavailable as error:
                # The server takes 50 at a time in a stream.
                if error.code != BATCHES_UNDER_WAY or attempt >= REFUSALS:
                    raise
            attempt += 1
            await pause(attempt)

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
            await pause(attempt)

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
            await pause(attempt)

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


def _present(record: Record | None, key: str, wanted: type[T]) -> Entry[T] | None:
    if record is None:
        return None
    change = change_of(record, key, wanted)
    return None if isinstance(change, Removed) else change


def _ttl_headers(ttl: float | None) -> Mapping[str, str]:
    if ttl is None:
        return {}
    number = isinstance(ttl, int | float) and not isinstance(ttl, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not number or not math.isfinite(ttl) or not 1 <= ttl <= MAX_TTL_SECONDS:
        raise ConfigError(
            "ttl", ttl, "is no time to live", f"give seconds from 1 to {MAX_TTL_SECONDS} (ten years)"
        )
    return _WITH_TTL


def _check_revision(revision: int, *, what: str = "revision") -> int:
    if not isinstance(revision, int) or isinstance(revision, bool) or revision < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            what, revision, "is no revision", "give the one of an entry; create() expects no key"
        )
    return revision
