"""What keys of locks may name, and what sessions of clients do to those of nodes."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import msgspec
import pytest
from tests.e2e.sessions import NAMES, STREAM
from tests.e2e.test_locks import TIMING, lock_subject, node

from phalanx import NatsOptions, Platform
from phalanx.client import PlatformClient
from phalanx.decide.session import SessionBody
from phalanx.testing.nats import NatsServer
from phalanx.types import Member, SessionId


@pytest.mark.parametrize("queued", [False, True])
async def test_g5_key_that_names_no_session_ends_nobodys(nats_server: NatsServer, queued: bool) -> None:
    """A program of the app writes a holder whose name, as a subject, is another node's session: the lock is
    free, and that session lives."""
    async with node("a", nats_server.url()) as a, node("c", nats_server.url()) as c:
        evil = {"session": {"node": "x", "nonce": str(c.session.id)}, "nonce": "n"}
        body = {"queue": [evil]} if queued else evil
        revision = await a.bus.write(lock_subject("x"), msgspec.json.encode(body))
        held = await a.locks.acquire("x", timeout=10)
        assert held.token > revision
        await asyncio.sleep(3 * TIMING.observe)
        assert not a.register.is_over(c.session.id)
        records = await a.bus.snapshot(STREAM, NAMES.session_subjects(STREAM))
        assert {each.subject for each in records} == {
            NAMES.session_subject(STREAM, each.session.id) for each in (a, c)
        }
        await a.bus.write(lock_subject("y"), msgspec.json.encode({"session": {"node": "", "nonce": ""}}))
        await (await a.locks.acquire("y", timeout=10)).release()


async def test_g1_client_ends_no_session_by_the_ttl_of_a_node_that_is_gone(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A member that has gone had a much shorter TTL: the client judges the sessions of nodes by theirs."""
    platform = Platform(
        "prod",
        node="n1",
        nats=nats_server.url(),
        data_dir=str(tmp_path),
        http={"enabled": False},
        timings={"ttl": 20},
    )
    async with platform, PlatformClient("prod", NatsOptions(urls=(nats_server.url(),))) as client:
        assert platform._node is not None
        session = platform._node.session
        assert session is not None
        gone = Member("gone", SessionId.new("gone"), 0.0, "0", ttl_seconds=1.5)
        await client.bus.write(
            NAMES.key_subject(NAMES.platform_bucket, "member.gone"), msgspec.json.encode(gone)
        )
        await client.locks().acquire("x", timeout=20)
        await asyncio.sleep(4)  # twice as long as from one renewal of the node to the next
        assert session.is_valid
        records = await client.bus.snapshot(STREAM, NAMES.session_subjects(STREAM))
        mine = [each for each in records if NAMES.session_of(each.subject) == session.id]
        assert [msgspec.json.decode(each.data, type=SessionBody).tombstone for each in mine] == [False]


HOLDER = """
import asyncio, sys
from phalanx import LockLost, NatsOptions
from phalanx.client import PlatformClient

async def main():
    async with PlatformClient("prod", NatsOptions(urls=(sys.argv[1],))) as client:
        held = await client.locks().acquire("x", timeout=20)
        print(held.token, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        try:
            held.check()
            print("held", flush=True)
        except LockLost:
            print("lost", flush=True)
        await asyncio.wait_for(held.lost.wait(), 20)
        await held.release()
        print("told", flush=True)

asyncio.run(main())
"""


async def test_client_that_stood_still_past_its_session_learns_that_it_holds_nothing(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Stopped like a laptop whose lid was closed: another has the lock by then, its token is refused, and on
    waking the first look says so."""
    platform = Platform(
        "prod",
        node="n1",
        nats=nats_server.url(),
        data_dir=str(tmp_path),
        http={"enabled": False},
        timings={"ttl": 4},
    )
    async with platform:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLDER, nats_server.url(),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(60):
                token = int(await process.stdout.readline())
                process.send_signal(signal.SIGSTOP)
                process.stdin.write(b"\n")
                async with platform.lock("x", timeout=40) as held:
                    assert held.token > token
                    assert not await platform.locks.is_current("x", token)
                    process.send_signal(signal.SIGCONT)
                    assert await process.stdout.readline() == b"lost\n"
                    assert await process.stdout.readline() == b"told\n"
                    held.check()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
