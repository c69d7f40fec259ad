"""Which reigns hold, and when somebody may be added to the member list, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from tests.waiting import until

from phalanx import system
from phalanx.bus.connection import NatsBus
from phalanx.bus.provision import bucket_config, create_stream
from phalanx.config import NatsOptions
from phalanx.coord.admission import Admission
from phalanx.coord.election import Election
from phalanx.coord.hold import Holds
from phalanx.decide.election import LeaderBody
from phalanx.decide.hold import MemberList
from phalanx.decide.timing import Timing
from phalanx.names import LEADER_KEY, MEMBERS_KEY, Names
from phalanx.ports import Record
from phalanx.testing.nats import NatsServer
from phalanx.types import Candidate, SessionId

NAMES = Names("prod")
BUCKET = NAMES.app_bucket("wiki")
TIMING = Timing.of(2.0)
ME, OTHER = SessionId("n1", "a"), SessionId("n2", "b")
PATIENCE_SECONDS = 20.0


class Lease:
    """A session that is valid as long as the test runs; taken up from an earlier life of the node."""

    id = ME
    is_valid = may_begin = is_taken_up = True

    def __init__(self) -> None:
        self.valid_until = system.now() + 1000.0
        self.extended_until = 0.0
        self.withdrawn: list[str] = []

    def right_until(self, app: str) -> float:
        """See Session."""
        return max(self.valid_until, self.extended_until)

    def withdraw(self, app: str) -> None:
        """See Session."""
        self.withdrawn.append(app)

    def on_change(self, callback: Callable[[], None]) -> None:
        """See Session."""

    off_change = on_change


class Everybody:
    """A register in which every session lives."""

    def is_over(self, session: SessionId) -> bool:
        """See Register."""
        return False

    ended_itself = is_over

    def note(self, session: SessionId) -> None:
        """See Register."""

    unnote = note

    def on_over(self, callback: Callable[[SessionId], None]) -> None:
        """See Register."""

    off_over = on_over


async def put(bus: NatsBus, key: str, value: object) -> int:
    """Store it; the revision."""
    return await bus.write(NAMES.key_subject(BUCKET, key), msgspec.json.encode(value))


async def members(bus: NatsBus) -> dict[str, str]:
    """Who is on the list."""
    record = await bus.read(NAMES.bucket_stream(BUCKET), NAMES.key_subject(BUCKET, MEMBERS_KEY))
    return msgspec.json.decode(record.data, type=MemberList).nodes if record is not None else {}


@asynccontextmanager
async def leading(
    nats_server: NatsServer, leader: LeaderBody
) -> AsyncGenerator[tuple[NatsBus, Holds, Lease, int]]:
    """n1 goes on with what *leader* says of it, and declares that it holds."""
    bus = await NatsBus.connect(NatsOptions(urls=(nats_server.url(),)), name="n1", ping_interval=1.0)
    try:
        await create_stream(bus, bucket_config(NAMES, BUCKET, "wiki", history=1, replicas=1))
        epoch = await put(bus, LEADER_KEY, leader)
        holds, lease = Holds(TIMING, "n1", lambda app: True), Lease()
        holds.address = "127.0.0.1:1"
        session: Any = lease
        register: Any = Everybody()
        election = Election(bus, NAMES, "wiki", session, register, adopted=epoch, holds=holds, hold=True)
        election.set_candidacy(True)
        running = asyncio.create_task(election.run())
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                assert (await election.next_reign()).epoch == epoch
            yield bus, holds, lease, epoch
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    finally:
        await bus.close()


async def test_g1_reign_that_an_earlier_life_began_without_holding_is_not_held(
    nats_server: NatsServer,
) -> None:
    """Its leader key says so to all who could follow: they do not look at promises then."""
    async with leading(nats_server, LeaderBody(ME, nonce="x")) as (bus, holds, lease, _):
        subject = NAMES.key_subject(BUCKET, NAMES.candidate_key("n1"))
        await until(lambda: bus.read(NAMES.bucket_stream(BUCKET), subject))
        await asyncio.sleep(3 * TIMING.renew_every)
        assert await members(bus) == {}
        assert holds.describe("wiki", lease) == (0.0, "")  # type: ignore[arg-type]


async def test_g1_what_was_promised_to_an_earlier_reign_is_withdrawn_before_the_next_begins(
    nats_server: NatsServer,
) -> None:
    """The session is the same: who has promised something to the first may follow the second."""
    async with leading(nats_server, LeaderBody(ME, nonce="x", hold=True)) as (_, _, lease, _):
        assert lease.withdrawn == ["wiki"]


async def test_g1_nobody_is_added_while_the_keeper_lets_the_section_outlive_its_session(
    nats_server: NatsServer,
) -> None:
    """Who is new has not promised what the keeper goes by; once the session reaches further it is added."""
    async with leading(nats_server, LeaderBody(ME, nonce="x", hold=True)) as (bus, _, lease, _):

        async def listed(*nodes: str) -> None:
            async def looks() -> bool:
                return sorted(await members(bus)) == list(nodes)

            await until(looks)

        await listed("n1")
        lease.extended_until = lease.valid_until + 1.0
        await put(bus, NAMES.candidate_key("n2"), Candidate(OTHER, True, 0, direct="127.0.0.1:2"))
        await asyncio.sleep(3 * TIMING.renew_every)
        await listed("n1")
        lease.valid_until = lease.extended_until
        await listed("n1", "n2")


@pytest.mark.parametrize("left", ["an older one", "none"])
async def test_list_that_the_servers_have_lost_does_not_keep_a_follower_from_reading_it(
    nats_server: NatsServer, left: str
) -> None:
    """It would expect a list that nobody has any more, and never lead."""
    bus = await NatsBus.connect(NatsOptions(urls=(nats_server.url(),)), name="n1", ping_interval=1.0)
    try:
        await create_stream(bus, bucket_config(NAMES, BUCKET, "wiki", history=1, replicas=1))
        revision = 0
        if left == "an older one":
            revision = await put(bus, MEMBERS_KEY, MemberList({"n1": "a:1"}, 2.0))
        admission = Admission(bus, NAMES, "wiki")
        later = msgspec.json.encode(MemberList({"n1": "a:1", "n2": "b:1"}, 2.0))
        admission.learn(Record(admission.subject, later, revision + 5))
        assert await admission.read()
        assert admission.revision == revision
        assert (admission.members is None) is (left == "none")
        assert not await admission.read()
    finally:
        await bus.close()
