"""A user's watch on the app's KV: the state and its changes, or every change since a revision."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from phalanx.coord.codec import Change, change_of, matcher
from phalanx.coord.kv_log import BucketLog
from phalanx.coord.watch import Watch
from phalanx.errors import BusUnavailable
from phalanx.names import FENCE_KEY, Names
from phalanx.ports import Bus, Connection, Record

T = TypeVar("T")

MAX_WAITING = 1024
"""Changes that wait one by one; beyond that only the newest of each key does."""


class KVWatch(Generic[T]):
    """Changes of the keys that match: ``async with kv.watch("users.>", User) as changes: async for …``.

    Without *since*: the present state, then each change. Changes of one key come in order. A consumer that
    falls more than 1024 changes behind gets only the newest one of each key that waits: it never misses a
    key's last value, and memory stays bounded by the number of keys.

    With *since*: every change after that revision, in the order of the revisions, none twice. Entering, and
    any later step, raises RevisionCompacted when some may be gone; the watch is over then. A consumer that
    falls behind is given the rest from the bucket later, as far as it is still there; what waits in memory is
    bounded by what the bucket holds.

    After a loss of the connection both go on with what changed meanwhile. A value that is not of the type
    raises WrongValue, and the next step goes on behind it. BusUnavailable: the connection was closed for
    good.
    """

    def __init__(
        self, bus: Bus, names: Names, app: str, pattern: str, wanted: type[T], since: int | None = None
    ) -> None:
        self._bus, self._wanted = bus, wanted
        bucket = names.app_bucket(app)
        self._prefix = names.key_subject(bucket, "kv.")
        self._waiting: deque[Record] = deque()
        self._full_at = MAX_WAITING
        self._some = asyncio.Event()
        self._closed = False
        self._failure: Exception | None = None
        self._revision = since or 0
        self._stop_listening: Callable[[], None] | None = None
        self._log: BucketLog | None = None
        if since is None:
            self._watch: Watch | BucketLog = Watch(
                bus,
                names.bucket_stream(bucket),
                self._prefix + pattern,
                watch_prefix=f"{names.watch_prefix(app)}.kv.{pattern}".removesuffix(".>"),
                on_record=self._on_record,
            )
            return
        prefix, matches = self._prefix, matcher(pattern)
        self._watch = self._log = BucketLog(
            bus,
            names.bucket_stream(bucket),
            names.key_subject(bucket, ">"),
            watch_prefix=names.watch_prefix(app),
            barrier=names.key_subject(bucket, FENCE_KEY),
            prefix=prefix,
            since=since,
            wanted=lambda subject: subject.startswith(prefix) and matches(subject[len(prefix) :]),
            on_record=self._on_logged,
            on_failed=self._on_failed,
        )

    @property
    def revision(self) -> int:
        """With *since*: every change up to this revision has been given out, so a later watch can begin here.
        Without it, 0."""
        if self._log is not None and not self._waiting and self._failure is None:
            return self._log.position
        return self._revision

    async def __aenter__(self) -> Self:
        self._stop_listening = self._bus.on_connection(self._on_connection)
        try:
            await self._watch.start()
            if self._failure is not None and not self._waiting:
                raise self._failure
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """No longer watch; the iteration ends. Harmless when done twice."""
        if self._stop_listening is not None:
            self._stop_listening()
        self._closed = True
        self._some.set()
        await self._watch.close()

    def __aiter__(self) -> Self:
        if self._stop_listening is None:
            raise RuntimeError("use it so: async with kv.watch(...) as changes: async for change in changes")
        return self

    async def __anext__(self) -> Change[T]:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            if self._failure is not None:
                raise self._failure
            if self._gone:
                raise BusUnavailable("watch", "the connection to NATS was closed")
            self._some.clear()
            await self._some.wait()
        record = self._waiting.popleft()
        if self._log is not None:
            self._revision = max(self._revision, record.revision)
            if len(self._waiting) == MAX_WAITING // 2 or not self._waiting:
                self._log.resume()
        return change_of(record, record.subject.removeprefix(self._prefix), self._wanted)

    _gone: bool = False

    def _on_connection(self, event: Connection) -> None:
        if event is Connection.CLOSED:
            self._gone = True
            self._some.set()

    def _on_logged(self, record: Record) -> bool:
        self._waiting.append(record)
        self._some.set()
        return len(self._waiting) < MAX_WAITING

    def _on_failed(self, error: Exception) -> None:
        self._failure = error
        self._some.set()

    def _on_record(self, record: Record) -> None:
        self._waiting.append(record)
        if len(self._waiting) > self._full_at:
            newest: dict[str, Record] = {}
            for each in self._waiting:
                newest.pop(each.subject, None)  # so that the order stays that of the newest changes
                newest[each.subject] = each
            self._waiting = deque(newest.values())
            # Twice what is left, so that conflating costs a constant time for each change.
            self._full_at = max(MAX_WAITING, 2 * len(newest))
        self._some.set()
