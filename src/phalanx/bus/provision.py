"""The streams and buckets of a platform: made once, found again, never silently made anew."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from phalanx import system
from phalanx.bus.connection import NatsBus
from phalanx.decide.session import StreamList
from phalanx.errors import BusError, BusTimeout, BusUnavailable, IdentityError, NatsUnusable
from phalanx.names import Names
from phalanx.ports import STREAM_NOT_FOUND, Bus

log = logging.getLogger("phalanx.nats")

NAME_IN_USE = 10058
NO_PEERS = (10005, 10074, 10023)
META_UNAVAILABLE_SECONDS = 15.0
"""How long a creation is tried: without its meta leader JetStream creates nothing for up to 9 s."""

PLACEMENT_SECONDS = 10.0
"""How long a session stream may take to come to its server (0.5 s measured)."""

MARKER_SECONDS = 1
"""How long the server shows that a key's time is up. It raises each shorter TTL in the bucket to this."""
MIN_SERVER = (2, 12)
AUDIT_MAX_AGE_SECONDS = 90 * 86400
AUDIT_MAX_BYTES = 1 << 30
EVENTS_MAX_AGE_SECONDS = 7 * 86400
EVENTS_MAX_BYTES = 1 << 30
"""How long the platform's own events are kept, and how much of them."""
EVENTS_DUPLICATE_SECONDS = 120
"""For how long after an event another one with the same id is not stored again."""
DEAD_MAX_BYTES = 1 << 30


async def check_nats(bus: NatsBus) -> dict[str, Any]:
    """The account's JetStream information. Raises NatsUnusable if Phalanx can't work with this NATS."""
    version = tuple(
        int(part) for part in bus.server_version.partition("-")[0].split(".")[:2] if part.isdigit()
    )
    if version < MIN_SERVER:
        raise NatsUnusable(
            f"nats-server {bus.server_version} at {bus.server_name} is too old",
            f"upgrade it to {'.'.join(map(str, MIN_SERVER))} or later (atomic batches, per-key TTL)",
        )
    deadline = system.now() + META_UNAVAILABLE_SECONDS
    while True:
        try:
            return await bus.api("INFO", {})
        except BusError as error:
            if isinstance(error, BusUnavailable | BusTimeout) and system.now() < deadline and bus.cluster:
                await asyncio.sleep(0.1)  # a cluster that is just forming
                continue
            raise NatsUnusable(
                f"JetStream is not available on {bus.server_name or 'the server'} ({error.description})",
                "enable it (nats-server -js, or a jetstream block) for this account, and allow this user "
                "$JS.API.> (see: phalanx nats permissions)",
            ) from error


def known_servers(bus: NatsBus) -> int:
    """How many servers of its cluster the connected server knows at present, itself included."""
    if not bus.cluster:
        return 1
    return max(1, len(set(bus.connect_urls)))


def wanted_replicas(bus: NatsBus, declared: int | None) -> int:
    """As declared; else three with three servers or more, else one."""
    return declared or (3 if known_servers(bus) >= 3 else 1)


# --- configurations


def bucket_config(
    names: Names, bucket: str, app: str | None, *, history: int, replicas: int
) -> dict[str, Any]:
    """A KV bucket (ADR-8) that republishes what it stores; see docs/storage.md."""
    return {
        "name": names.bucket_stream(bucket),
        "subjects": [names.key_subject(bucket, ">")],
        "storage": "file",
        "num_replicas": replicas,
        "max_msgs_per_subject": history,
        "discard": "new",
        "deny_delete": True,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "allow_atomic": True,
        "allow_msg_ttl": True,
        "subject_delete_marker_ttl": MARKER_SECONDS * 1_000_000_000,
        "duplicate_window": 120_000_000_000,
        "republish": {"src": names.key_subject(bucket, ">"), "dest": f"{names.watch_prefix(app)}.>"},
    }


def session_config(names: Names, stream: str, *, replicas: int = 1) -> dict[str, Any]:
    """A session stream: one key for each session, one replica."""
    return {
        "name": stream,
        "subjects": [names.session_subjects(stream)],
        "storage": "file",
        "num_replicas": replicas,
        "max_msgs_per_subject": 1,
        "allow_direct": True,
        "allow_msg_ttl": True,
        "duplicate_window": 1_000_000_000,
        "republish": {"src": names.session_subjects(stream), "dest": f"{names.session_watch(stream)}.>"},
    }


def audit_config(names: Names, *, replicas: int) -> dict[str, Any]:
    """The audit log: 90 days, at most 1 GiB."""
    return {
        "name": names.audit_stream,
        "subjects": [names.audit_subjects],
        "storage": "file",
        "num_replicas": replicas,
        "max_age": AUDIT_MAX_AGE_SECONDS * 1_000_000_000,
        "max_bytes": AUDIT_MAX_BYTES,
        "discard": "old",
        "allow_direct": True,
        "duplicate_window": 600_000_000_000,
    }


def events_config(
    names: Names, app: str | None, *, max_age_seconds: float, max_bytes: int, replicas: int
) -> dict[str, Any]:
    """The events of *app*, with the fence of its leaders; None: the platform's. The oldest give way."""
    subjects = [names.event_subject(app, ">")]
    return {
        "name": names.events_stream(app),
        "subjects": [*subjects, names.event_fence_subject(app)] if app else subjects,
        "storage": "file",
        "num_replicas": replicas,
        "max_age": round(max_age_seconds * 1_000_000_000),
        "max_bytes": max_bytes,
        "discard": "old",
        "allow_direct": True,
        "allow_msg_ttl": True,
        "duplicate_window": round(min(EVENTS_DUPLICATE_SECONDS, max_age_seconds) * 1_000_000_000),
        "republish": {"src": names.event_subject(app, ">"), "dest": names.event_watch(app)},
    }


def dead_config(names: Names, *, replicas: int) -> dict[str, Any]:
    """The dead letters. None gives way to a newer one: while it is full the events stay where they are."""
    return {
        "name": names.dead_stream,
        "subjects": [names.dead_subjects],
        "storage": "file",
        "num_replicas": replicas,
        "max_bytes": DEAD_MAX_BYTES,
        "discard": "new",
        "allow_direct": True,
        "duplicate_window": 600_000_000_000,
    }


def wal_config(names: Names, app: str, *, replicas: int) -> dict[str, Any]:
    """The WAL log of *app*. Nothing leaves it by itself: it is purged by sequence, behind a snapshot."""
    return {
        "name": names.wal_stream(app),
        "subjects": [names.wal_subjects(app)],
        "storage": "file",
        "num_replicas": replicas,
        "discard": "new",
        "deny_delete": True,
        "allow_direct": True,
        "duplicate_window": 1_000_000_000,
        "republish": {"src": names.wal_subjects(app), "dest": f"{names.wal_watch(app)}.>"},
    }


def objects_config(names: Names, app: str, *, replicas: int) -> dict[str, Any]:
    """The object store of *app* (ADR-20), which `nats object` can read."""
    bucket = names.snapshots_bucket(app)
    return {
        "name": names.object_stream(bucket),
        "subjects": [names.object_chunks(bucket, ">"), names.object_entries(bucket)],
        "storage": "file",
        "num_replicas": replicas,
        "discard": "new",
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "duplicate_window": 1_000_000_000,
    }


# --- creation


async def stream_info(bus: Bus, stream: str) -> dict[str, Any] | None:
    """What JetStream says of *stream*; None if there is none. Tries while JetStream has no leader."""
    deadline = system.now() + META_UNAVAILABLE_SECONDS
    while True:
        try:
            return await bus.api(f"STREAM.INFO.{stream}", {}, timeout=2.0)
        except (BusUnavailable, BusTimeout):
            if system.now() >= deadline:
                raise
            await asyncio.sleep(0.2)
        except BusError as error:
            if error.code == STREAM_NOT_FOUND:
                return None
            raise


async def create_stream(bus: Bus, config: dict[str, Any]) -> dict[str, Any]:
    """Create *config*'s stream, or find the one that is there and bring history and replicas in line.

    Tries while JetStream has no leader. Raises NatsUnusable when it refuses.
    """
    name = config["name"]
    deadline = system.now() + META_UNAVAILABLE_SECONDS
    while True:
        try:
            return await bus.api(f"STREAM.CREATE.{name}", config)
        except (BusUnavailable, BusTimeout) as error:
            problem: BusError = error
        except BusError as error:
            if error.code == NAME_IN_USE:
                return await _bring_in_line(bus, config)
            if error.code not in NO_PEERS:
                raise NatsUnusable(f"stream {name} cannot be created: {error}", "see docs/nats.md") from error
            problem = error
        if system.now() >= deadline:
            raise NatsUnusable(
                f"stream {name} cannot be created: {problem}",
                f"it needs {config['num_replicas']} JetStream servers that run and have free storage",
            ) from problem
        await asyncio.sleep(0.2)


async def _bring_in_line(bus: Bus, config: dict[str, Any]) -> dict[str, Any]:
    """An existing stream: history follows the declaration, replicas only grow."""
    name = config["name"]
    info = await stream_info(bus, name)
    if info is None:
        return await bus.api(f"STREAM.CREATE.{name}", config)
    present: dict[str, Any] = info["config"]
    changed: dict[str, Any] = {}
    if present.get("max_msgs_per_subject") != config.get("max_msgs_per_subject", -1):
        changed["max_msgs_per_subject"] = config.get("max_msgs_per_subject", -1)
    for limit in ("max_age", "max_bytes", "duplicate_window"):
        if name.endswith("_events") and present.get(limit) != config[limit]:
            changed[limit] = config[limit]
    if present.get("num_replicas", 1) < config["num_replicas"]:
        changed["num_replicas"] = config["num_replicas"]
    if present.get("subjects") != config["subjects"] or present.get("republish") != config.get("republish"):
        raise IdentityError(
            f"stream {name} exists, but Phalanx did not make it so (its subjects or republish differ)",
            "rename the platform, or remove that stream if nothing needs it",
        )
    if not changed:
        return info
    log.warning("stream %s: bringing %s in line with the declaration", name, changed)
    try:
        return await bus.api(f"STREAM.UPDATE.{name}", {**present, **changed}, timeout=10.0)
    except BusError as error:
        # It works as it is; a later start tries again.
        log.error("stream %s could not be updated to %s: %s", name, changed, error)
        return info


async def create_session_streams(bus: NatsBus, names: Names, *, servers: int) -> StreamList:
    """Make the first session streams: three, each on another server, or one where there are fewer.

    The caller holds the platform's set-up lock and has not published a list yet.
    """
    if servers < 3:
        await create_stream(bus, session_config(names, names.session_stream(1)))
        return StreamList(1, (names.session_stream(1),))
    used: dict[str, str] = {}
    for number in (1, 2, 3):
        stream = names.session_stream(number)
        server = await place_session_stream(bus, names, stream, avoid=set(used))
        if server is None:
            log.error("session streams can't be placed on three servers; one replicated stream is used")
            single = names.session_stream(4)
            await create_stream(bus, session_config(names, single, replicas=3))
            return StreamList(1, (single,))
        used[server] = stream
    return StreamList(1, tuple(used.values()))


async def place_session_stream(bus: Bus, names: Names, stream: str, avoid: set[str]) -> str | None:
    """Create *stream* on a server that is not in *avoid*; its name, None if that can't be had.

    JetStream has no placement by server name, and for a stream with one replica it takes the server with
    the most free storage, time and again. So the stream is made on several servers, its leader moved to
    the right one, and then all replicas but the leader's are given up. No list names the stream yet.
    """
    await create_stream(bus, session_config(names, stream, replicas=3 if len(avoid) < 3 else 5))
    deadline = system.now() + PLACEMENT_SECONDS
    while system.now() < deadline:
        try:
            if server := await _place(bus, stream, avoid):
                return server
        except (BusUnavailable, BusTimeout) as error:
            log.info("placing %s: %s", stream, error)
        await asyncio.sleep(0.05)
    await bus.api(f"STREAM.DELETE.{stream}", {})
    return None


async def _place(bus: Bus, stream: str, avoid: set[str]) -> str:
    """The next step of :func:`place_session_stream`; the server once *stream* lives on it alone."""
    info = await bus.api(f"STREAM.INFO.{stream}", {})
    leader = _leader(info)
    cluster: dict[str, Any] = info.get("cluster") or {}
    replicas: list[dict[str, Any]] = cluster.get("replicas") or []
    if not leader:
        return ""
    if leader in avoid:
        current = [str(r["name"]) for r in replicas if r.get("current") and not r.get("offline")]
        if fit := [server for server in current if server not in avoid]:
            await bus.api(f"STREAM.LEADER.STEPDOWN.{stream}", {"placement": {"preferred": fit[0]}})
        return ""
    if info["config"]["num_replicas"] > 1:
        await bus.api(f"STREAM.UPDATE.{stream}", {**info["config"], "num_replicas": 1})
        return ""
    return "" if replicas else leader


def _leader(info: dict[str, Any]) -> str:
    cluster: dict[str, Any] = info.get("cluster") or {}
    return str(cluster.get("leader") or "")
