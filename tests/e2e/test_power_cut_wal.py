"""A loss of power takes the end of the WAL of a program with ``PRAGMA synchronous = NORMAL`` (G3)."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_database import audited, database_stage, kill_all_of, rows_of, set_aside

from phalanx.bus.connection import NatsBus
from phalanx.config import NatsOptions
from phalanx.data import ltx
from phalanx.data.log import LogEnd, WalLog
from phalanx.data.sqlite_wal import WAL_HEADER_BYTES
from phalanx.data.wal_files import scan_wal
from phalanx.names import Names
from phalanx.observe.audit import AuditEntry
from phalanx.testing.nats import NatsServer
from phalanx.testing.stage import Stage, since_now

ROWS = 60
"""So many are committed before the power fails: more than one checkpoint's worth would begin the WAL anew."""

STEPS = ("database-truncated", "database-diverged", "database-returned")
OPTIONS = {"sync": "server"}


class Host:
    """The files of one node whose processes are all dead, as the disk has them."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.live = folder / "wiki.db"
        self.folder = folder / ".wiki.db-phalanx"

    def captured(self) -> dict[int, ltx.Header]:
        """The files of Litestream, by transaction."""
        found: dict[int, ltx.Header] = {}
        for path in (self.folder / "capture" / "ltx" / "0").glob("*.ltx"):
            header = ltx.decode_header(path.read_bytes()[: ltx.HEADER_BYTES])
            found[header.max_txid] = header
        return found

    def newest(self) -> int:
        """The last transaction that is captured."""
        names = [path.name for path in (self.folder / "capture" / "ltx" / "0").glob("*.ltx")]
        return max((txids[1] for txids in map(ltx.parse_file_name, names) if txids is not None), default=0)

    def end_of(self, txid: int) -> int:
        """Where it ends in the WAL, in bytes."""
        header = self.captured()[txid]
        return header.wal_offset + header.wal_size

    def state(self) -> dict[str, Any]:
        """What the replica's folder says of itself."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_bytes())
        return state

    def lose_wal_after(self, offset: int) -> None:
        """The power fails: what is in the WAL after *offset* has not got to the disk, and the host starts
        again. (The index on the disk may still tell of it.)"""
        wal = self.live.with_name("wiki.db-wal")
        newest = self.captured()[self.newest()]
        header, _ = scan_wal(wal)
        assert header is not None
        salts = newest.wal_salt1.to_bytes(4, "big") + newest.wal_salt2.to_bytes(4, "big")
        assert header.salts == salts, "the WAL was begun anew meanwhile: nothing of it would be missed"
        assert offset < newest.wal_offset + newest.wal_size <= wal.stat().st_size
        with wal.open("r+b") as file:
            file.truncate(offset)
        self.start_again()

    def start_again(self) -> None:
        """The host has another boot id from now on."""
        state = self.state()
        assert state["role"] in ("live", "promoting")
        (self.folder / "state.json").write_text(json.dumps({**state, "boot": "another"}))

    def half_of_wal(self) -> int:
        """The middle of what was captured of the WAL."""
        return (WAL_HEADER_BYTES + self.end_of(self.newest())) // 2


def committed(running: Stage) -> int:
    """The number of the newest row."""
    return max((e.data["number"] for e in running.history.events("committed")), default=0)


async def settled_steps(nats: NatsServer, node: str) -> list[AuditEntry]:
    """What was said about the database that *node* came back with."""
    return [e for e in await audited(nats, *STEPS) if e.node == node]


def check_rows(path: Path, last: int) -> None:
    """All rows up to *last* are in a sound database."""
    assert rows_of(path, "PRAGMA integrity_check") == [("ok",)]
    numbers = [number for (number,) in rows_of(path, "SELECT number FROM entries ORDER BY number")]
    assert numbers[:last] == list(range(1, last + 1))


async def end_of_log(nats: NatsServer) -> LogEnd:
    """Where the log of the app ends."""
    bus = await NatsBus.connect(NatsOptions(urls=(nats.url(0),)))
    try:
        return await WalLog(bus, Names("test"), "wiki").last()
    finally:
        await bus.close()


@pytest.mark.parametrize("others_lead", [False, True])
async def test_g3_power_cut_of_the_active_host_its_disk_lacks_confirmed_rows(
    tmp_path: Path, nats_server: NatsServer, others_lead: bool
) -> None:
    """The shorter database is never taken for what the log says: it is made anew from that, and led with."""
    stop = tmp_path / "stop"
    settings = {"count": 2 if others_lead else 1, "sync_every": 5, "stop_file": str(stop)}
    with database_stage(tmp_path, nats_server, database_options=OPTIONS, **settings) as running:
        cut = await running.settled()
        await running.nodes.wait_until(lambda: committed(running) >= ROWS, 30, "too few rows")
        stop.touch()
        confirmed = (await running.wait_for("rested", 0.0)).data["number"]
        since = since_now()
        kill_all_of(running.nodes[cut])
        host = Host(tmp_path / cut)
        host.lose_wal_after(host.half_of_wal())
        if others_lead:
            other = (await running.wait_for("opened", since)).node
            since = since_now()
            stop.unlink()
            await running.wait_for("confirmed", since)
            running.nodes[cut].start()
            await running.nodes.wait_for_standbys("wiki", 1)
            await running.wait_for("confirmed", since_now())
            since = since_now()
            kill_all_of(running.nodes[other])
            confirmed = max(e.data["number"] for e in running.history.events("confirmed") if e.at < since)
        else:
            stop.unlink()
            running.nodes[cut].start()
        opened = await running.wait_for("opened", since, node=cut)
        assert opened.data["number"] >= confirmed
        check_rows(tmp_path / cut / "wiki.db", confirmed)
        said = await settled_steps(nats_server, cut)
        assert [e.action for e in said] == ["database-truncated"]
        assert "its disk has lost the end" in said[0].reason
        assert (said[0].details["transactions"], said[0].details["exact"]) == ("0", "true")
        assert Path(said[0].details["file"]) in set_aside(tmp_path)
        running.check()


async def captured_and_not_logged(running: Stage, nats: NatsServer, host: Host) -> tuple[int, int]:
    """NATS is away, and what *host* still captures does not get into the log; then it dies, and NATS is back.

    Returns the last transaction of the log, and the last captured one.
    """
    nats.kill()
    before = host.newest()
    await running.nodes.wait_until(lambda: host.newest() >= before + 5, 10, "nothing is captured any more")
    kill_all_of(running.nodes[host.name])
    nats.start()
    await nats.ready()
    logged, captured = (await end_of_log(nats)).txid, host.newest()
    assert logged + 2 <= captured
    return logged, captured


def rows_left(live: Path, copy: Path) -> int:
    """The last row of the database as its disk has it."""
    copy.mkdir()
    for part in live.parent.glob(f"{live.name}*"):
        if part.name.removeprefix(live.name) in ("", "-wal"):
            shutil.copy(part, copy / part.name)
    with contextlib.closing(sqlite3.connect(copy / live.name)) as connection:
        last: int = connection.execute("SELECT max(number) FROM entries").fetchone()[0]
    return last


async def test_g3_power_cut_the_disk_has_less_than_was_captured_and_others_lead(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """What was captured and is nowhere any more is counted; what the disk has left of it is kept beside."""
    with database_stage(tmp_path, nats_server, count=2, sync_every=0, database_options=OPTIONS) as running:
        host = Host(tmp_path / await running.settled())
        other = "n1" if host.name == "n2" else "n2"
        await running.nodes.wait_until(lambda: committed(running) >= ROWS, 30, "too few rows")
        kill_all_of(running.nodes[other])  # what it would do meanwhile is not what is tested
        logged, captured = await captured_and_not_logged(running, nats_server, host)
        host.lose_wal_after(host.end_of(logged + 1))
        since = since_now()
        running.nodes[other].start()
        await running.wait_for("committed", since, node=other)
        running.nodes[host.name].start()
        await running.nodes.wait_for_standbys("wiki", 1)
        said = await settled_steps(nats_server, host.name)
        assert [e.action for e in said] == ["database-diverged"]
        assert f"at least {captured - logged}; its disk has lost the end of them" in said[0].reason
        assert (said[0].details["transactions"], said[0].details["exact"]) == (
            str(captured - logged),
            "false",
        )
        assert Path(said[0].details["file"]) in set_aside(tmp_path)
        running.check()


async def test_g3_power_cut_the_disk_has_less_than_was_captured_and_nobody_has_led(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """The database has all that the log has, and more: it goes on with that, and captures it anew."""
    stop = tmp_path / "stop"
    settings = {"count": 2, "sync_every": 0, "stop_file": str(stop)}
    with database_stage(tmp_path, nats_server, database_options=OPTIONS, **settings) as running:
        host = Host(tmp_path / await running.settled())
        other = "n1" if host.name == "n2" else "n2"
        await running.nodes.wait_until(lambda: committed(running) >= ROWS, 30, "too few rows")
        kill_all_of(running.nodes[other])  # what it would do meanwhile is not what is tested
        logged, _ = await captured_and_not_logged(running, nats_server, host)
        host.lose_wal_after(host.end_of(logged + 1))
        left = rows_left(host.live, tmp_path / "copy")
        since = since_now()
        running.nodes[host.name].start()
        opened = await running.wait_for("opened", since)
        assert opened.data["number"] == left
        said = await settled_steps(nats_server, host.name)
        assert [e.action for e in said] == ["database-truncated"]
        assert "that are not in the log: unknown, at least 1" in said[0].reason
        assert not set_aside(tmp_path)
        # What is captured from now on has no hole.
        running.nodes[other].start()
        await running.nodes.wait_for_standbys("wiki", 1)
        stop.touch()
        confirmed = (await running.wait_for("rested", since)).data["number"]
        since = since_now()
        kill_all_of(running.nodes[host.name])
        opened = await running.wait_for("opened", since, node=other)
        assert opened.data["number"] >= confirmed
        check_rows(tmp_path / other / "wiki.db", confirmed)
        running.check()


@pytest.mark.parametrize("in_order", [True, False])
async def test_g3_site_goes_down_without_nats_and_comes_back(
    tmp_path: Path, nats_server: NatsServer, in_order: bool
) -> None:
    """It goes on with all rows on the disk. Whoever closes the database last removes its WAL: no loss."""
    with database_stage(tmp_path, nats_server, count=1, sync_every=0, database_options=OPTIONS) as running:
        host = Host(tmp_path / await running.settled())
        await running.nodes.wait_until(lambda: committed(running) >= ROWS, 30, "too few rows")
        nats_server.kill()
        number = committed(running)
        await running.nodes.wait_until(lambda: committed(running) > number + 5, 10, "nothing is committed")
        if in_order:
            running.nodes[host.name].terminate()
            running.nodes[host.name].wait(30)
            assert not host.live.with_name("wiki.db-wal").exists()
            assert host.state()["boot"] == "closed"
        else:
            kill_all_of(running.nodes[host.name])
            host.start_again()
        nats_server.start()
        await nats_server.ready()
        since = since_now()
        last = rows_left(host.live, tmp_path / "copy")
        assert last >= committed(running)
        running.nodes[host.name].start()
        opened = await running.wait_for("opened", since)
        assert opened.data["number"] == last
        assert not set_aside(tmp_path)
        running.check()
