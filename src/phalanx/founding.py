"""What must exist in NATS before a node can take part: made once, found again, never silently made anew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from phalanx import system
from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.config import Events
from phalanx.coord.membership import AppRegistration, Identity, PlatformState
from phalanx.decide.session import StreamList
from phalanx.errors import BusTimeout, BusUnavailable, IdentityError, StartError
from phalanx.names import Names
from phalanx.observe.journal import Journal

log = logging.getLogger("phalanx.node")

START_PATIENCE_SECONDS = 30.0
SETUP_LOCK_SECONDS = 120.0
"""Longer than three session streams can take to be placed: a second maker would move the first one's."""

SETUP_WAIT_SECONDS = 150.0

GONE_SECONDS = 3.0
"""How long a stream must be unknown until it counts as vanished."""


async def patiently(work: Callable[[], Awaitable[None]], what: str) -> None:
    """Do *work* again while NATS does not answer: a stream that was just made has no leader yet.

    Every step of it reads before it writes, so doing it twice is harmless.
    """
    deadline = system.now() + START_PATIENCE_SECONDS
    while True:
        try:
            return await work()
        except (BusUnavailable, BusTimeout) as error:
            if system.now() >= deadline:
                raise StartError(f"cannot {what}: {error}", "see phalanx doctor") from error
            log.info("%s; trying again", error)
        await asyncio.sleep(0.2)


class Founding:
    """Joins the platform, or founds it. After :meth:`run` there are ``state`` and ``streams``."""

    state: PlatformState
    streams: StreamList

    def __init__(self, bus: NatsBus, names: Names, node: str, data_dir: Path, journal: Journal) -> None:
        self._bus, self._names, self._node = bus, names, node
        self._data_dir, self._journal = data_dir, journal

    async def run(
        self,
        declared_replicas: int | None,
        histories: Mapping[str, int],
        with_databases: Iterable[str] = (),
        with_events: Mapping[str, Events] | None = None,
    ) -> None:
        """Make or find everything. *histories*: of each app, how many revisions of a key its KV keeps.
        *with_databases*: the apps that have a WAL log and an object store as well; *with_events*: those that
        have events of their own, and for how long they keep them.

        Raises IdentityError, NatsUnusable, BusError; after BusUnavailable or BusTimeout it may be called
        again.
        """
        await provision.check_nats(self._bus)
        replicas = provision.wanted_replicas(self._bus, declared_replicas)
        await self._join_platform(replicas)
        await self._make_platform_streams(replicas)
        for app, history in histories.items():
            await self._make_bucket(app, history, replicas)
        for app in with_databases:
            await self._make_log(app, replicas)
        for app, events in (with_events or {}).items():
            await self._make_events(app, events, replicas)

    async def _make_platform_streams(self, replicas: int) -> None:
        """What the platform has besides its bucket: the audit log, its events, the dead letters."""
        names = self._names
        events = provision.events_config(
            names,
            None,
            max_age_seconds=provision.EVENTS_MAX_AGE_SECONDS,
            max_bytes=provision.EVENTS_MAX_BYTES,
            replicas=replicas,
        )
        for config in (
            provision.audit_config(names, replicas=replicas),
            events,
            provision.dead_config(names, replicas=replicas),
        ):
            await provision.create_stream(self._bus, config)

    async def _join_platform(self, replicas: int) -> None:
        """The platform's bucket and identity: joined, or made when this node never knew one."""
        names = self._names
        known = self._known_identity()
        stream = names.bucket_stream(names.platform_bucket)
        if known is not None and await self._is_gone(stream):
            raise IdentityError(
                f"the bucket {names.platform_bucket!r} is gone, but this node belongs to platform {known.id}",
                "NATS lost its data, or this is another NATS. Restore it; or, to start a new platform "
                f"without the old data, remove {self._identity_path} on every node (docs/operations.md)",
            )
        await provision.create_stream(
            self._bus,
            provision.bucket_config(names, names.platform_bucket, None, history=4, replicas=replicas),
        )
        self.state = PlatformState(self._bus, names)
        identity = await self.state.create_or_read(names.IDENTITY_KEY, Identity.new())
        if known is not None and known.id != identity.id:
            raise IdentityError(
                f"this node belongs to platform {known.id}, but NATS holds another one called "
                f"{names.platform!r} ({identity.id})",
                f"connect it to its own NATS; or remove {self._identity_path} to join the other platform",
            )
        if known is None:
            temporary = self._identity_path.with_suffix(".new")
            temporary.write_bytes(msgspec.json.encode(identity))
            temporary.replace(self._identity_path)
        self.streams = await self._session_streams()

    async def _is_gone(self, stream: str) -> bool:
        """Whether *stream* does not exist, for long enough: a server may not know yet of one just made."""
        deadline = system.now() + GONE_SECONDS
        while await provision.stream_info(self._bus, stream) is None:
            if system.now() >= deadline:
                return True
            await asyncio.sleep(0.2)
        return False

    @property
    def _identity_path(self) -> Path:
        return self._data_dir / "identity.json"

    def _known_identity(self) -> Identity | None:
        try:
            return msgspec.json.decode(self._identity_path.read_bytes(), type=Identity)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise IdentityError(
                f"{self._identity_path} is damaged ({error})",
                "remove it if this NATS is the right one",
            ) from None

    async def _session_streams(self) -> StreamList:
        """The list of session streams; made by one node, under a lock that lapses with its maker."""
        deadline = system.now() + SETUP_WAIT_SECONDS
        while True:
            found = await self.state.read(self._names.SESSIONS_KEY, StreamList)
            if found is not None:
                return found[0]
            if await self.state.take_setup_lock(self._node, SETUP_LOCK_SECONDS):
                servers = provision.known_servers(self._bus)
                streams = await provision.create_session_streams(self._bus, self._names, servers=servers)
                streams = await self.state.create_or_read(self._names.SESSIONS_KEY, streams)
                self._journal.platform("session-streams-made", ", ".join(streams.all_streams))
                return streams
            if system.now() > deadline:
                raise StartError(
                    "another node has been setting up the platform for too long", "see that node's log"
                )
            await asyncio.sleep(0.1)

    async def _make_bucket(self, app: str, history: int, replicas: int) -> None:
        """The app's bucket. One that was there once and has vanished is never made anew silently."""
        names, bucket = self._names, self._names.app_bucket(app)
        registered = await self.state.read(names.app_key(app), AppRegistration)
        stream = names.bucket_stream(bucket)
        if registered is not None and await self._is_gone(stream):
            raise IdentityError(
                f"the bucket {bucket!r} of app {app!r} is gone, though the app was created once",
                "restore it from a backup; or accept the loss: see docs/operations.md",
            )
        await provision.create_stream(
            self._bus,
            provision.bucket_config(names, bucket, app, history=history, replicas=replicas),
        )
        if registered is None:
            await self.state.create_or_read(names.app_key(app), AppRegistration(system.wall(), self._node))

    async def _make_log(self, app: str, replicas: int) -> None:
        """The app's WAL log and object store; like the bucket, never made anew silently."""
        names = self._names
        key = names.database_key(app)
        registered = await self.state.read(key, AppRegistration)
        for config in (
            provision.wal_config(names, app, replicas=replicas),
            provision.objects_config(names, app, replicas=replicas),
        ):
            if registered is not None and await self._is_gone(config["name"]):
                raise IdentityError(
                    f"the stream {config['name']!r} of app {app!r} is gone, though it was created once",
                    "restore it from a backup; or accept the loss: see docs/operations.md",
                )
            await provision.create_stream(self._bus, config)
        if registered is None:
            await self.state.create_or_read(key, AppRegistration(system.wall(), self._node))

    async def _make_events(self, app: str, events: Events, replicas: int) -> None:
        """The stream of the app's events; like the bucket, never made anew silently."""
        config = provision.events_config(
            self._names,
            app,
            max_age_seconds=float(events.max_age),
            max_bytes=int(events.max_bytes),
            replicas=replicas,
        )
        key = self._names.events_key(app)
        registered = await self.state.read(key, AppRegistration)
        if registered is not None and await self._is_gone(config["name"]):
            raise IdentityError(
                f"the stream {config['name']!r} of app {app!r} is gone, though it was created once",
                "restore it from a backup; or accept the loss: see docs/operations.md",
            )
        await provision.create_stream(self._bus, config)
        if registered is None:
            await self.state.create_or_read(key, AppRegistration(system.wall(), self._node))
