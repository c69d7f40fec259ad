"""What ``phalanx doctor`` looks at in NATS, as the node would see it: with its login, from this machine."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import statistics
from datetime import datetime
from typing import Any

from phalanx import preflight, system
from phalanx.bus import provision
from phalanx.cli import output
from phalanx.cli.findings import Check, Finding, fail, ok, warn
from phalanx.cli.host_checks import LITTLE_SPACE
from phalanx.cli.output import span
from phalanx.client import PlatformClient
from phalanx.config import PlatformConfig
from phalanx.decide.session import StreamList
from phalanx.errors import BusError, NatsUnusable, PlatformNotFound, WrongRevision
from phalanx.ports import STREAM_NOT_FOUND
from phalanx.types import SessionId

TRIPS = 20
MANY = 3
"""So many refusals make the point."""

CLOCK_SECONDS = 1.0
RATE = 0.05
JITTER_SECONDS = 0.05
"""How much the ways to and from the server may differ."""

NEVER_A_REVISION = 1 << 50
"""A write that expects this revision is always refused: it shows the right to write, and writes nothing."""

_PERMISSIONS = "allow it for this user; phalanx nats permissions prints what is needed"


class NatsChecks:
    """The checks, in order. *client* is connected."""

    def __init__(self, client: PlatformClient, config: PlatformConfig) -> None:
        self._client, self._bus, self._names = client, client.bus, client.names
        self._ttl = float(config.timings.ttl)
        self._info: dict[str, dict[str, Any]] = {}
        self._streams: StreamList | None = None
        self._exists = False
        self._moments: list[tuple[float, float]] = []
        """Pairs of our steady clock and the server's wall clock."""

    def all(self) -> list[tuple[str, Check]]:
        """Name and check, in the order in which they build on each other."""
        return [
            ("nats", self.server),
            ("jetstream", self.jetstream),
            ("platform", self.platform),
            ("replicas", self.replicas),
            ("sessions", self.sessions),
            ("peers", self.peers),
            ("permissions", self.permissions),
            ("round-trip", self.round_trip),
            ("clocks", self.clocks),
            ("members", self.members),
        ]

    async def server(self) -> list[Finding]:
        """The connection."""
        bus = self._bus
        cluster = f" of cluster {bus.cluster}" if bus.cluster else ""
        return [ok("nats", f"connected to {bus.server_name}{cluster}, nats-server {bus.server_version}")]

    async def jetstream(self) -> list[Finding]:
        """Version, JetStream, and the account's limits."""
        try:
            info = await provision.check_nats(self._bus)
        except NatsUnusable as error:
            said = f"; the server said: {self._bus.last_error}" if self._bus.last_error else ""
            return [fail("jetstream", f"{error.problem}{said}", error.remedy)]
        limits: dict[str, Any] = info.get("limits") or {}
        most, used = int(limits.get("max_storage", -1)), int(info.get("storage", 0))
        streams, count = int(limits.get("max_streams", -1)), int(info.get("streams", 0))
        found = [self._storage(most, used)]
        if streams > 0 and streams - count < 10:
            text = f"{count} of {streams} streams are used"
            remedy = "raise max_streams of the account: each app needs one, the platform five"
            found.append((fail if streams - count < 1 else warn)("jetstream", text, remedy))
        return found

    def _storage(self, most: int, used: int) -> Finding:
        if most < 0:
            return ok("jetstream", f"on; {output.size(used)} used, no limit for this account")
        text = f"on; {output.size(used)} of {output.size(most)} used"
        remedy = "raise max_file of the account (the audit log alone may take 1 GiB)"
        if most - used < LITTLE_SPACE:
            return fail("jetstream", text, remedy)
        return (
            warn("jetstream", text, remedy)
            if most - used < provision.AUDIT_MAX_BYTES
            else ok("jetstream", text)
        )

    async def platform(self) -> list[Finding]:
        """Whether the platform exists, and all that it needs."""
        names = self._names
        try:
            apps, databases = await self._client.apps(), await self._client.databases_made()
        except PlatformNotFound:
            text = f"platform {names.platform} does not exist yet; its first node makes it"
            return [ok("platform", text)]
        self._exists = True
        self._streams = await self._client.session_streams()
        wanted = [
            names.bucket_stream(names.platform_bucket),
            names.audit_stream,
            *(names.bucket_stream(names.app_bucket(app)) for app in apps),
            *(names.wal_stream(app) for app in databases),
            *(names.object_stream(names.snapshots_bucket(app)) for app in databases),
            *(self._streams.all_streams if self._streams is not None else ()),
        ]
        found = await asyncio.gather(*(self._stream_problem(stream) for stream in wanted))
        problems = [problem for problem in found if problem is not None]
        text = f"platform {names.platform}: {len(wanted)} streams, {len(apps)} apps"
        return problems or [ok("platform", text)]

    async def _stream_problem(self, stream: str) -> Finding | None:
        """Ask for one stream, once: that it does not answer just now is what is wanted to be known."""
        try:
            self._info[stream] = await self._ask_info(stream)
        except BusError as error:
            if error.code == STREAM_NOT_FOUND:
                remedy = "restore it from a backup; see docs/operations.md"
                return fail("platform", f"the stream {stream} is gone", remedy)
            text = f"the stream {stream} is not served just now ({error.description})"
            if self._streams is not None and stream in self._streams.all_streams:
                # One replica each, on different servers: sessions need a majority of them.
                return warn("platform", text, "start the server that holds it; sessions bear the loss of one")
            return fail("platform", text, "start the servers that hold it; see: nats stream report")
        return None

    async def _ask_info(self, stream: str) -> dict[str, Any]:
        before = system.now()
        info = await self._bus.api(f"STREAM.INFO.{stream}", {}, timeout=2.0)
        if at := _server_time(info):
            self._moments.append(((before + system.now()) / 2, at))
        return info

    async def replicas(self) -> list[Finding]:
        """How many servers there are, and whether the streams make use of them."""
        servers = self._servers()
        if servers == 1:
            text, remedy = "one NATS server: while it is away nothing is active", "run three"
            found = [warn("replicas", text, remedy)]
        elif servers == 2:
            text = "two NATS servers bear no loss: JetStream needs a majority of them"
            found = [warn("replicas", text, "run three, or one")]
        else:
            found = [ok("replicas", f"{servers} NATS servers")]
        sessions = self._streams.all_streams if self._streams is not None else ()
        few = [
            name
            for name, info in self._info.items()
            if name not in sessions and int(info["config"].get("num_replicas", 1)) < min(3, servers)
        ]
        if few and servers >= 3:
            text = f"one replica only, though there are {servers} servers: {', '.join(few)}"
            found.append(warn("replicas", text, "start the nodes again one by one: that adds replicas"))
        return found

    def _servers(self) -> int:
        """How many servers there are, those that are down included, as far as a stream knows them."""
        named: set[str] = set()
        for info in self._info.values():
            cluster: dict[str, Any] = info.get("cluster") or {}
            replicas: list[dict[str, Any]] = cluster.get("replicas") or []
            named.update(str(replica.get("name")) for replica in replicas)
            if leader := _leader(info):
                named.add(leader)
        return max(provision.known_servers(self._bus), len(named))

    async def sessions(self) -> list[Finding]:
        """Whether the session streams are on different servers, so that each may be lost."""
        if self._streams is None:
            return []
        where = {name: _leader(self._info[name]) for name in self._streams.streams if name in self._info}
        shown = ", ".join(f"{name} on {server or '?'}" for name, server in where.items())
        if len(where) == 1:
            if self._servers() < 3:
                return [ok("sessions", shown)]
            text = f"only one session stream ({shown}), though there are three servers or more"
            return [
                warn("sessions", text, "the loss of that server ends all sessions; see docs/operations.md")
            ]
        if len(set(where.values())) < len(where):
            remedy = "they repair themselves when a server comes back or is replaced; see docs/operations.md"
            return [warn("sessions", f"two session streams on one server: {shown}", remedy)]
        return [ok("sessions", shown)]

    async def peers(self) -> list[Finding]:
        """Replicas that are offline or behind, streams without leader."""
        bad: dict[str, list[str]] = {}
        for name, info in self._info.items():
            cluster: dict[str, Any] = info.get("cluster") or {}
            if cluster and not cluster.get("leader"):
                bad.setdefault("without leader", []).append(name)
            replicas: list[dict[str, Any]] = cluster.get("replicas") or []
            for replica in replicas:
                if replica.get("offline"):
                    bad.setdefault(f"{replica.get('name')} offline", []).append(name)
                elif not replica.get("current"):
                    bad.setdefault(f"{replica.get('name')} behind", []).append(name)
        if not bad:
            return [ok("peers", "all replicas are up to date")] if self._info else []
        return [
            warn(
                "peers", f"{what}: {', '.join(names)}", "start that server, or remove it: nats server cluster"
            )
            for what, names in bad.items()
        ]

    async def permissions(self) -> list[Finding]:
        """Whether this user may do what nodes do. What exists is not changed."""
        refused: list[str] = []
        names = self._names
        if self._exists:
            subjects = [names.key_subject(names.platform_bucket, names.member_key("doctor"))]
            subjects += [
                names.key_subject(names.app_bucket(app), names.candidate_key("doctor"))
                for app in await self._client.apps()
            ]
            streams = self._streams.all_streams if self._streams is not None else ()
            nobody = SessionId.new("doctor")
            subjects += [names.session_subject(stream, nobody) for stream in streams]
            # One after the other, since the server's complaint is of the last one; a refusal costs 2 s.
            for subject in subjects:
                if len(refused) < MANY and (problem := await self._may_not_write(subject)):
                    refused.append(problem)
        if refused:
            return [fail("permissions", "; ".join(refused), _PERMISSIONS)]
        return [ok("permissions", "may write where nodes write")] if self._exists else []

    async def _may_not_write(self, subject: str) -> str:
        """Why not; empty if this user may, or if nobody serves that stream (which other checks tell)."""
        try:
            await self._bus.write(subject, b"", expect=NEVER_A_REVISION)
        except WrongRevision:
            return ""
        except BusError:
            said = self._bus.last_error
            return said if preflight.PERMISSION in said.lower() and subject.lower() in said.lower() else ""
        return f"{subject}: a write with an impossible revision was accepted"

    async def round_trip(self) -> list[Finding]:
        """Make a stream, write to it, read it, delete it: what renewing a session takes."""
        token = secrets.token_hex(6)
        stream, subject = self._names.scratch_stream(token), self._names.scratch_subject(token)
        request = {"name": stream, "subjects": [subject], "storage": "file", "allow_direct": True}
        request |= {"max_age": 120_000_000_000, "num_replicas": 1}
        try:
            await self._bus.api(f"STREAM.CREATE.{stream}", request)
        except BusError as error:
            return [self._refused("no stream can be made", error)]
        try:
            times = [await self._timed_write(subject) for _ in range(TRIPS)]
            await self._bus.read_log(stream, subject)
            await self._ask_info(stream)
        except BusError as error:
            return [self._refused("a new stream cannot be written and read", error)]
        finally:
            with contextlib.suppress(BusError):
                await self._bus.api(f"STREAM.DELETE.{stream}", {})
        return [judge_writes(times, self._ttl)]

    def _refused(self, what: str, error: BusError) -> Finding:
        """A failed step of the round trip: for want of a permission, or because NATS does not answer."""
        said = self._bus.last_error
        if preflight.PERMISSION in said.lower():
            return fail("round-trip", f"{what}: {said}", _PERMISSIONS)
        return fail("round-trip", f"{what}: {error}", "see the other lines, and the logs of the NATS servers")

    async def _timed_write(self, subject: str) -> float:
        began = system.now()
        await self._bus.write(subject, b"", timeout=5.0)
        return system.now() - began

    async def clocks(self) -> list[Finding]:
        """This host's clock beside the server's."""
        return judge_clocks(self._moments, system.wall() - system.now())

    async def members(self) -> list[Finding]:
        """Who is there, and who should be."""
        if not self._exists:
            return []
        nodes = await self._client.nodes()
        found: list[Finding] = []
        for node in nodes:
            if node.is_live and not node.answers:
                text = f"node {node.node} has a session but does not answer"
                found.append(warn("members", text, "look at its log; it may be frozen, or have just died"))
            elif not node.answers:
                text = f"node {node.node} is dead"
                found.append(
                    warn("members", text, "start it again; or it is gone for good, and stays listed")
                )
            elif node.status is not None:
                found += [
                    warn("members", f"node {node.node}: {problem}", "see its log")
                    for problem in node.status.problems
                ]
        answering = [node.node for node in nodes if node.answers]
        return [ok("members", f"{len(answering)} answer: {', '.join(answering) or 'none'}"), *found]


def judge_writes(times: list[float], ttl: float) -> Finding:
    """Whether writes that took so long (seconds) leave a session of that TTL room to be renewed."""
    median, most, limit = statistics.median(times), max(times), ttl / 20
    text = (
        f"a stored write takes {span(median)}, {span(most)} at most ({len(times)} tried); ttl is {span(ttl)}"
    )
    remedy = f"raise timings.ttl above {span(20 * most)}, or bring NATS nearer (faster disks, shorter ways)"
    if median > limit:
        return fail("round-trip", text, remedy)
    return warn("round-trip", text, remedy) if most > limit else ok("round-trip", text)


def judge_clocks(moments: list[tuple[float, float]], to_wall: float) -> list[Finding]:
    """*moments*: pairs of our steady clock and the server's wall clock. *to_wall*: from our steady to our
    wall clock. Only the rate matters to decisions; the time does to whoever reads logs."""
    if not moments:
        return []
    steady, at = moments[-1]
    offset = at - (steady + to_wall)
    found: list[Finding] = []
    if abs(offset) > CLOCK_SECONDS:
        text = f"this host and the NATS server differ by {span(abs(offset))}"
        found.append(warn("clocks", text, "run NTP (chrony); no decision depends on it, but logs do"))
    first_steady, first_at = moments[0]
    passed = steady - first_steady
    if passed > 0.1:  # over less the network's own delays would decide
        rate = (at - first_at) / passed - 1
        if abs(rate) > max(RATE, JITTER_SECONDS / passed):
            text = f"the clocks of this host and of the NATS server differ by {100 * rate:.0f} % in rate"
            found.append(fail("clocks", text, "repair the machine's clock source: G1 needs rates within 5 %"))
    return found or [ok("clocks", f"differs from the NATS server's by {span(abs(offset))}")]


def _leader(info: dict[str, Any]) -> str:
    cluster: dict[str, Any] = info.get("cluster") or {}
    return str(cluster.get("leader") or "")


def _server_time(info: dict[str, Any]) -> float:
    """When the server answered, by its clock; 0 where it does not say."""
    text = str(info.get("ts") or "")
    try:
        # Nanoseconds are more than fromisoformat of Python 3.11 takes.
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0
