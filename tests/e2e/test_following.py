"""Followers of an app's WAL log on real servers, with a replica in memory."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.origin import Origin
from tests.e2e.wal import APP, NAMES, STREAM, MemoryReplica, connected, draft, ltx_file, make_log
from tests.waiting import until

from phalanx.bus.connection import NatsBus
from phalanx.data import log as log_module
from phalanx.data import pushed as pushed_module
from phalanx.data.entries import LogRecord, Seal, SealKind
from phalanx.data.following import Follower, Replica, confirmed
from phalanx.data.log import WalLog
from phalanx.data.replica_client import ReplicaProcess
from phalanx.errors import BusError, BusTimeout, ReplicaUnavailable
from phalanx.testing.faults import TcpProxy
from phalanx.testing.nats import NatsCluster, NatsServer
from phalanx.types import Position


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    async with connected(nats_server.url()) as bus:
        yield bus


@pytest.fixture
async def log(bus: NatsBus) -> WalLog:
    return await make_log(bus)


class Writer:
    """An active node's end of the log."""

    def __init__(self, log: WalLog, epoch: int = 3) -> None:
        self.log, self.epoch = log, epoch
        self.sequence = self.txid = 0

    async def open(self) -> None:
        sealed = await self.log.seal(self.epoch, "n1", SealKind.OPEN)
        self.sequence, self.txid = sealed.sequence, sealed.txid

    async def write(self, count: int = 1, content: bytes | None = None) -> int:
        for _ in range(count):
            self.txid += 1
            self.sequence = await self.log.append(self.sequence, draft(self.epoch, self.txid, content))
        return self.sequence


@pytest.fixture
async def writer(log: WalLog) -> Writer:
    writer = Writer(log)
    await writer.open()
    return writer


@asynccontextmanager
async def following(bus: NatsBus, replica: Replica, **more: Any) -> AsyncGenerator[Follower]:
    """A follower that is stopped at the end; its troubles are in ``more['troubles']``."""
    troubles: list[str] = more.pop("troubles", [])
    follower = Follower(
        bus, NAMES, APP, replica, WalLog(bus, NAMES, APP), node="n2", on_trouble=troubles.append, **more
    )
    await follower.start()
    try:
        yield follower
    finally:
        await follower.stop()


async def test_follower_takes_up_what_is_there_and_what_comes(bus: NatsBus, writer: Writer) -> None:
    """It applies the log from the start, then each record as it is written, and hears of seals."""
    await writer.write(5)
    seals: list[Seal] = []
    replica = MemoryReplica()
    async with following(bus, replica, on_seal=seals.append) as follower:
        assert follower.known_end == 6
        await follower.wait_for(writer.sequence, 5)
        await writer.write(5)
        await follower.wait_for(writer.sequence, 5)
        assert follower.applied == replica.position == Position(11, 10)
        assert (follower.lag_records, follower.lag_bytes, follower.lag_seconds) == (0, 0, 0.0)
        assert follower.epoch == 3
    assert [seal.sequence for seal in seals] == [1]
    assert replica.data == {txid: ltx_file(txid) for txid in range(1, 11)}


async def test_pushed_records_need_no_read(bus: NatsBus, writer: Writer) -> None:
    """What is pushed is applied as it comes: the log is not read for it."""
    async with following(bus, MemoryReplica()) as follower:
        await follower.wait_for(1, 5)
        calls = 0
        read = follower._log.read  # pyright: ignore

        async def counted(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            return await read(*args, **more)

        follower._log.read = counted  # pyright: ignore
        await writer.write(200)
        await follower.wait_for(writer.sequence, 5)
        assert calls == 0


async def test_record_whose_push_was_lost_is_looked_for_when_somebody_waits(
    bus: NatsBus, writer: Writer
) -> None:
    """A push that never came: who waits for that record gets it long before the next look at the log."""
    async with following(bus, MemoryReplica()) as follower:
        await follower.wait_for(1, 5)
        assert follower._subscription is not None  # pyright: ignore
        await follower._subscription.unsubscribe()  # pyright: ignore
        await writer.write(3)
        assert follower.applied.sequence == 1
        await follower.wait_for(4, 5)


async def test_g8_follower_goes_on_where_its_replica_is(bus: NatsBus, writer: Writer) -> None:
    """A follower that is stopped while records come goes on later without a gap and without a repetition."""
    replica = MemoryReplica()
    for _ in range(5):
        async with following(bus, replica) as follower:
            writing = asyncio.create_task(writer.write(50))
            await follower.wait_for(writer.sequence + 10, 5)
        await writing
    async with following(bus, replica) as follower:
        await follower.wait_for(writer.sequence, 5)
    assert [sequence for _, sequence in replica.calls] == list(range(1, 252))


async def test_follower_that_is_stopped_leaves_nothing_under_way(bus: NatsBus, writer: Writer) -> None:
    """A follower that is stopped while its replica applies waits for that: the position is known then."""
    replica = MemoryReplica(delay_seconds=0.05)
    for _ in range(3):
        async with following(bus, replica) as follower:
            await writer.write(3)
            await until(lambda: follower._calls)  # pyright: ignore
        position, calls = replica.position, len(replica.calls)
        await asyncio.sleep(0.12)
        assert (replica.position, len(replica.calls)) == (position, calls)


async def test_oversized_record_comes_from_the_object_store(
    bus: NatsBus, writer: Writer, tmp_path: Path
) -> None:
    """Records with a pointer are fetched, between others, pushed or read later."""
    (tmp_path / "record-left.ltx").write_bytes(b"of a node that died")
    big = [ltx_file(2, 3_000_000), ltx_file(4, 2_000_000)]
    live, late = MemoryReplica(), MemoryReplica()
    async with following(bus, live, spool=tmp_path) as follower:
        await writer.write()
        await writer.write(1, big[0])
        await writer.write()
        await writer.write(1, big[1])
        await writer.write()
        await follower.wait_for(writer.sequence, 5)
    async with following(bus, late, spool=tmp_path) as follower:
        await follower.wait_for(writer.sequence, 5)
    assert live.data == late.data
    assert [live.data[2], live.data[4]] == big
    assert [path.name for path in tmp_path.iterdir()] == ["followed.json"]  # noqa: ASYNC240


async def test_object_that_cannot_be_read_at_first_is_tried_again(
    bus: NatsBus, writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS does not answer while an oversized record is fetched: it and what follows are taken again."""
    download, failures = WalLog.download, 3

    async def failing(self: WalLog, record: LogRecord, target: Path) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise BusTimeout("read", "no answer")
        await download(self, record, target)

    monkeypatch.setattr(WalLog, "download", failing)
    replica = MemoryReplica()
    async with following(bus, replica, spool=tmp_path) as follower:
        await writer.write(1)
        await writer.write(1, ltx_file(2, 2_000_000))
        await writer.write(3)
        await follower.wait_for(writer.sequence, 10)
    assert [sequence for _, sequence in replica.calls] == list(range(1, 7))


async def test_connection_that_breaks_again_and_again(
    bus: NatsBus, writer: Writer, nats_server: NatsServer
) -> None:
    """A follower whose connection breaks while records come misses nothing and applies nothing twice."""
    replica = MemoryReplica()
    async with (
        TcpProxy("127.0.0.1", nats_server.port()) as link,
        connected(link.url, ping_interval=0.2) as far,
        following(far, replica) as follower,
    ):
        for round_ in range(6):
            await writer.write(20)
            link.black_hole() if round_ == 3 else link.cut()
            await writer.write(20)
            link.heal()
            await writer.write(20)
            await follower.wait_for(writer.sequence, 20)
    assert [sequence for _, sequence in replica.calls] == list(range(1, writer.sequence + 1))


async def test_what_was_written_while_cut_off_is_applied_although_nothing_comes_after(
    bus: NatsBus, writer: Writer, nats_server: NatsServer
) -> None:
    """After a reconnection the follower looks by itself: it does not wait for the next record."""
    async with (
        TcpProxy("127.0.0.1", nats_server.port()) as link,
        connected(link.url, ping_interval=0.2) as far,
        following(far, MemoryReplica()) as follower,
    ):
        await until(lambda: follower.applied.sequence == writer.sequence)
        link.cut()
        await until(lambda: not far.is_connected)
        await writer.write(5)
        link.heal()
        await until(lambda: follower.applied.sequence == writer.sequence)


async def test_slow_replica_keeps_the_queue_within_bounds(
    bus: NatsBus, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that come faster than they are applied are dropped beyond the bound, and read later."""
    monkeypatch.setattr(pushed_module, "MAX_PUSHED", 10)
    replica = MemoryReplica(delay_seconds=0.003)
    async with following(bus, replica) as follower:
        await writer.write(300)
        assert len(follower._pushed) <= 10  # pyright: ignore
        assert follower.lag_records > 10
        assert follower.lag_seconds > 0
        await follower.wait_for(writer.sequence, 20)
        await until(lambda: follower.lag_seconds == 0)
    assert [sequence for _, sequence in replica.calls] == list(range(1, writer.sequence + 1))


async def test_follower_that_cannot_start_without_nats_starts_later(
    bus: NatsBus, writer: Writer, nats_server: NatsServer
) -> None:
    """NATS is away at the start: that is an error, the follower says so, and can be started again."""
    await writer.write(3)
    replica = MemoryReplica()
    follower = Follower(
        bus, NAMES, APP, replica, WalLog(bus, NAMES, APP), node="n2", on_trouble=lambda reason: None
    )
    nats_server.kill()
    await until(lambda: not bus.is_connected)
    with pytest.raises(BusError):
        await follower.start()
    assert follower.trouble is not None
    nats_server.start()
    await nats_server.ready()
    await until(lambda: bus.is_connected)
    await follower.start()
    try:
        await follower.wait_for(4, 10)
        assert follower.trouble is None
        assert str(follower.applied) == "4/3"
    finally:
        await follower.stop()


async def test_log_that_begins_after_the_replica_is_trouble(bus: NatsBus, writer: Writer) -> None:
    """A replica whose next record was purged has to be made anew: said once, at the start or later."""
    await writer.write(5)
    await writer.log.purge(3)
    troubles: list[str] = []
    async with following(bus, MemoryReplica(Position(2, 1)), troubles=troubles) as follower:
        await until(lambda: follower.trouble)
        with pytest.raises(ReplicaUnavailable, match="begins at 4"):
            await follower.wait_for(5, 20)
    assert troubles == ["the log begins at 4, the replica is at 2"]
    async with following(bus, MemoryReplica(Position(3, 2)), troubles=troubles) as follower:
        await follower.wait_for(6, 5)
    assert len(troubles) == 1


async def test_replica_that_fails_is_trouble(bus: NatsBus, writer: Writer) -> None:
    """A record that the replica does not take ends the follower, with the reason."""
    troubles: list[str] = []
    replica = MemoryReplica()
    async with following(bus, replica, troubles=troubles) as follower:
        await writer.write(2)
        await writer.write(1, b"this is no LTX file")
        await until(lambda: follower.trouble)
        assert follower.applied == Position(3, 2)
    assert len(troubles) == 1
    assert "LTX" in troubles[0]


async def test_foreign_message_is_skipped(bus: NatsBus, writer: Writer) -> None:
    """Something in the log that is not Phalanx's changes nothing, and holds nobody up."""
    async with following(bus, MemoryReplica()) as follower:
        await writer.write(2)
        await bus.write("prod.wiki.wal.ltx", b"junk")
        second = Writer(writer.log, 4)
        await second.open()
        await second.write(2)
        await follower.wait_for(second.sequence, 5)
        assert follower.applied == Position(7, 4)


async def test_rolled_back_log_is_noticed_by_a_running_follower(
    bus: NatsBus, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS has lost the end of the log and another reign has written there: the replica is in trouble."""
    monkeypatch.setattr(log_module, "DECIDE_SECONDS", 0.3)
    troubles: list[str] = []
    async with following(bus, MemoryReplica(), troubles=troubles) as follower:
        await writer.write(5)
        await follower.wait_for(writer.sequence, 5)
        await bus.api(f"STREAM.DELETE.{STREAM}", {})
        other = Writer(await make_log(bus), 4)
        await other.open()
        await other.write(2)
        await until(lambda: troubles)
    assert "NATS" in troubles[0] or "but 6/5 was applied" in troubles[0]


async def test_rolled_back_log_that_has_grown_again_is_noticed_at_the_start(
    bus: NatsBus, writer: Writer
) -> None:
    """A follower that was away while the log went back and grew beyond its position notices it."""
    await writer.write(5)
    replica = MemoryReplica()
    async with following(bus, replica) as follower:
        await follower.wait_for(6, 5)
    await bus.api(f"STREAM.DELETE.{STREAM}", {})
    other = Writer(await make_log(bus), 4)
    await other.open()
    await other.write(3)
    other = Writer(other.log, 5)
    await other.open()
    await other.write(3)
    troubles: list[str] = []
    async with following(bus, replica, troubles=troubles):
        await until(lambda: troubles)
    assert "lost acknowledged writes" in troubles[0]
    assert replica.position == Position(6, 5)


async def test_rolled_back_log_whose_positions_are_as_before_is_noticed_at_the_start(
    bus: NatsBus, writer: Writer, tmp_path: Path
) -> None:
    """The log went back to before a seal and grew again, another seal at its place: the nonce tells."""
    replica, troubles = MemoryReplica(), list[str]()
    async with following(bus, replica, spool=tmp_path) as follower:
        await writer.write(2)
        await follower.wait_for(3, 5)
    async with following(bus, replica, spool=tmp_path, troubles=troubles) as follower:
        await follower.wait_for(3, 5)  # the same log
    await bus.api(f"STREAM.DELETE.{STREAM}", {})
    other = Writer(await make_log(bus), 4)
    await other.open()
    await other.write(3)
    async with following(bus, replica, spool=tmp_path, troubles=troubles):
        await until(lambda: troubles)
    assert "than the seal at 1" in troubles[0]
    replica.path = Path("gen-1/replica.db")  # it was made anew: what is remembered says nothing of it
    async with following(bus, replica, spool=tmp_path, troubles=troubles) as follower:
        await follower.wait_for(4, 5)
    assert len(troubles) == 1


async def test_who_waits_for_a_follower_that_is_stopped_is_told_at_once(bus: NatsBus, writer: Writer) -> None:
    """Nobody waits until a deadline for a follower that has been stopped."""
    async with following(bus, MemoryReplica()) as follower:
        waiting = asyncio.create_task(follower.wait_for(100, 60))
        await follower.wait_for(1, 5)
    with pytest.raises(TimeoutError, match="stopped"):
        await waiting


# --- confirmations


async def test_g3_confirmation_comes_after_the_record_is_applied_and_synced(
    bus: NatsBus, writer: Writer
) -> None:
    """A standby that is asked before it has a record answers when it has it, and has synced."""
    replica = MemoryReplica()
    async with following(bus, replica) as follower:
        await follower.wait_for(1, 5)
        asking = asyncio.create_task(confirmed(bus, NAMES, APP, 3, 5, epoch=3))
        await writer.write()
        await follower.wait_for(2, 5)
        assert not asking.done()
        await writer.write()
        answer = await asking
        assert (answer.node, answer.sequence) == ("n2", 3)
        assert replica.synced.sequence == 3


async def test_confirmation_without_a_standby_times_out(bus: NatsBus, writer: Writer) -> None:
    """Nobody follows: the barrier fails at its deadline; a follower that comes meanwhile saves it."""
    await writer.write()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await confirmed(bus, NAMES, APP, 2, 0.3)
    assert time.monotonic() - began < 10
    asking = asyncio.create_task(confirmed(bus, NAMES, APP, 2, 10))
    await asyncio.sleep(0.05)
    async with following(bus, MemoryReplica()):
        assert (await asking).sequence == 2


async def test_follower_of_another_history_confirms_nothing(bus: NatsBus, writer: Writer) -> None:
    """A follower whose last entry is of another epoch than the asking one does not answer."""
    await writer.write()
    async with following(bus, MemoryReplica()) as follower:
        await follower.wait_for(2, 5)
        with pytest.raises(TimeoutError):
            await confirmed(bus, NAMES, APP, 2, 0.3, epoch=4)


async def test_confirmations_of_many_askers_share_a_sync(bus: NatsBus, writer: Writer) -> None:
    """Askers that come while one sync is under way are answered by the next one together."""
    replica = MemoryReplica()
    syncs = 0
    sync = replica.sync

    async def slow() -> Position:
        nonlocal syncs
        syncs += 1
        await asyncio.sleep(0.02)
        return await sync()

    replica.sync = slow
    await writer.write()
    async with following(bus, replica) as follower:
        await follower.wait_for(2, 5)
        await asyncio.gather(*(confirmed(bus, NAMES, APP, 2, 5) for _ in range(100)))
    assert syncs <= 5


# --- the real replica


async def test_g8_real_replica_that_is_killed_again_and_again_ends_up_identical(
    bus: NatsBus, writer: Writer, tmp_path: Path
) -> None:
    """The replica's process is killed while records come: a new one goes on, and ends byte for byte equal."""
    origin = Origin(tmp_path)
    replica = ReplicaProcess(tmp_path / "folder", lambda reason: None)
    troubles: list[str] = []
    try:
        for round_ in range(4):
            await replica.start()
            async with following(bus, replica, spool=tmp_path / "folder", troubles=troubles) as follower:
                for number in range(40):
                    rows = 1500 if (round_, number) == (1, 20) else 1
                    entry = origin.round(rows=rows)
                    await writer.write(1, entry.data)
                    if number == 25 and round_ < 3:
                        os.kill(replica.pid, signal.SIGKILL)
                if round_ < 3:
                    await until(lambda: follower.trouble)
                else:
                    await follower.wait_for(writer.sequence, 20)
                    answer = await confirmed(bus, NAMES, APP, writer.sequence, 10, epoch=3)
                    assert answer.sequence == writer.sequence
        assert len(troubles) == 3
        assert replica.position == Position(writer.sequence, origin.txid)
        assert await replica.fingerprint() == origin.fingerprint(origin.txid)
    finally:
        await replica.close()
        origin.close()


# --- speed


async def test_catch_up_with_20000_records(
    bus: NatsBus, log: WalLog, capsys: pytest.CaptureFixture[str]
) -> None:
    """A follower that is far behind catches up at a good pace, and live records get through afterwards."""
    writer = Writer(log)
    await writer.open()
    content = {txid: ltx_file(txid, 8192) for txid in range(1, 201)}
    # Written in parallel and without expectations: this test is about reading.
    from phalanx.data.entries import EPOCH, NONCE, TXID

    for start in range(1, 20_001, 500):
        await asyncio.gather(
            *(
                bus.write(
                    NAMES.wal_record_subject(APP),
                    content[txid % 200 + 1],
                    headers={EPOCH: "3", TXID: str(txid), NONCE: str(txid)},
                    timeout=30,
                )
                for txid in range(start, start + 500)
            )
        )
    replica = MemoryReplica()
    replica.data = _Nothing()
    began = time.perf_counter()
    async with following(bus, replica) as follower:
        assert follower.lag_records == 20_001
        await follower.wait_for(20_001, 60)
        took = time.perf_counter() - began
        await bus.write(
            NAMES.wal_record_subject(APP), ltx_file(20_001), headers={EPOCH: "3", TXID: "20001", NONCE: "x"}
        )
        await follower.wait_for(20_002, 5)
    with capsys.disabled():
        print(f"\n    caught up with 20,000 records in {took:.2f} s: {20_000 / took:.0f}/s")


class _Nothing(dict[int, bytes]):
    def __setitem__(self, key: int, value: bytes) -> None:
        pass


async def test_latency_from_append_to_follower(
    nats_server: NatsServer, writer: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    """How long it takes from before an append until a follower on another connection has applied it."""
    async with connected(nats_server.url()) as far, following(far, MemoryReplica()) as follower:
        await follower.wait_for(1, 5)
        delays: list[float] = []
        for _ in range(300):
            began = time.perf_counter()
            waiting = asyncio.create_task(follower.wait_for(writer.sequence + 1, 5))
            await writer.write()
            await waiting
            delays.append(time.perf_counter() - began)
    median = statistics.median(delays)
    with capsys.disabled():
        p95 = sorted(delays)[int(len(delays) * 0.95)]
        print(f"\n    append to applied: median {1e3 * median:.2f} ms, p95 {1e3 * p95:.2f} ms")
    assert median < 0.05


async def test_g3_follower_on_three_servers_whose_servers_die_one_after_the_other(
    nats_cluster: NatsCluster,
) -> None:
    """The log's leader and the follower's server are killed while records come: none missing, none twice."""
    replica = MemoryReplica()
    async with connected(*nats_cluster.urls) as bus, connected(*nats_cluster.urls, ping_interval=0.3) as far:
        log = await make_log(bus, replicas=3)
        writer = Writer(log)
        await writer.open()
        async with following(far, replica) as follower:
            for name in (lambda: nats_cluster.stream_leader(STREAM), lambda: far.server_name):
                await writer.write(50)
                killed = nats_cluster.index(name())
                nats_cluster.kill(killed)
                for _ in range(50):
                    writer.txid += 1
                    writer.sequence = await log.append(writer.sequence, draft(3, writer.txid), timeout=30)
                await follower.wait_for(writer.sequence, 30)
                nats_cluster.start(killed)
                await nats_cluster.ready()
    assert [sequence for _, sequence in replica.calls] == list(range(1, 202))
