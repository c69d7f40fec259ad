"""What was set aside is told whatever the disk does, and as much of its number as is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.data import disk, ltx
from phalanx.data.captured_files import CapturedFiles
from phalanx.data.replica_state import ReplicaState
from phalanx.data.settlement import Settlements
from phalanx.decide.settling import LocalDatabase, LoggedReign, Place
from phalanx.types import Position


def settlements_in(folder: Path, report: Callable[..., None], name: str = "wiki.db") -> Settlements:
    """Those of a node without anything else."""
    database: Any = SimpleNamespace(
        live=folder / name, folder=folder / f".{name}-phalanx", node="n1", app="wiki", report=report
    )
    return Settlements(database)


def test_disk_is_full_when_an_earlier_life_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told at each start until the disk takes the note; the database is tended all the same."""
    told: list[str] = []
    settlements = settlements_in(tmp_path, lambda action, reason, **_: told.append(action))
    aside = tmp_path / "wiki.db.diverged-3"
    aside.touch()
    settlements.note(aside, epoch=3, sequence=10, txid=8, transactions=2, exact=True, size_bytes=4096)

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(disk, "replace_file", refuse)
        settlements.report_left()
    settlements.report_left()
    settlements.report_left()
    assert told == ["database-diverged"] * 2


@pytest.mark.parametrize(
    ("transactions", "exact", "said"),
    [(7, True, "log: 7;"), (7, False, "log: unknown, at least 7;"), (0, False, "log: unknown;")],
)
def test_number_that_is_not_known_is_said_to_be_unknown(
    tmp_path: Path, transactions: int, exact: bool, said: str
) -> None:
    """Nobody reads "at least 0" as "nothing"."""
    told: list[str] = []
    settlements = settlements_in(tmp_path, lambda action, reason, **_: told.append(reason))
    aside = tmp_path / "wiki.db.diverged-3"
    aside.touch()
    settlements.note(
        aside, epoch=3, sequence=10, txid=8, transactions=transactions, exact=exact, size_bytes=4096
    )
    settlements.report_left()
    assert said in told[0]


@pytest.mark.parametrize(
    ("transactions", "exact", "action", "said"),
    [
        (0, True, "database-truncated", "it is made anew from the log; what it has left is in"),
        (7, False, "database-diverged", "unknown, at least 7; its disk has lost the end of them"),
        (0, False, "database-diverged", "unknown; its disk has lost the end of them"),
    ],
)
def test_what_the_disk_has_lost_is_never_said_to_be_kept(
    tmp_path: Path, transactions: int, exact: bool, action: str, said: str
) -> None:
    """The file beside has what was before."""
    told: list[tuple[str, str]] = []
    settlements = settlements_in(tmp_path, lambda action, reason, **_: told.append((action, reason)))
    aside = tmp_path / "wiki.db.diverged-3"
    aside.touch()
    settlements.note(
        aside,
        epoch=3,
        sequence=10,
        txid=8,
        transactions=transactions,
        exact=exact,
        size_bytes=4096,
        lost_end=True,
    )
    settlements.report_left()
    assert told[0][0] == action
    assert said in told[0][1]
    assert "kept" not in told[0][1]


def test_captured_files_that_the_log_lacks_are_a_lower_bound(tmp_path: Path) -> None:
    """Each holds a transaction; one with every page may hold nothing new, a damaged one tells nothing."""
    captured = tmp_path / "capture" / "ltx" / "0"
    captured.mkdir(parents=True)

    def capture(txid: int, pages: int, *, damaged: bool = False) -> None:
        header = ltx.Header(page_size=512, commit=3, min_txid=txid, max_txid=txid)
        data = ltx.encode(header, [ltx.Page(number, bytes(512)) for number in range(1, pages + 1)])
        (captured / ltx.file_name(txid, txid)).write_bytes(data[: -20 if damaged else None])

    for txid in (11, 12, 13, 14):
        capture(txid, 2)
    capture(15, 3)
    capture(16, 2, damaged=True)
    assert CapturedFiles(tmp_path).count_after(12) == 2
    assert CapturedFiles(tmp_path).count_after(16) == 0


@pytest.mark.parametrize("name", ["wi[k]i.db", "*.db", "a?b.db"])
def test_name_of_a_database_is_no_pattern(tmp_path: Path, name: str) -> None:
    """What was set aside is found whatever its database is called, and nobody else's is."""
    told: list[str] = []
    settlements = settlements_in(tmp_path, lambda action, reason, **_: told.append(reason), name)
    other = settlements_in(tmp_path, lambda *_, **__: None, "axb.db")
    for each in (settlements, other):
        aside = each.free_name("3")
        aside.touch()
        each.note(aside, epoch=3, sequence=10, txid=8, transactions=2, exact=True, size_bytes=4096)
    assert [Path(what.file).name for what in settlements.diverged()] == [f"{name}.diverged-3"]
    settlements.report_left()
    assert len(told) == 1


def test_place_where_the_log_ends_is_that_of_its_file_or_of_the_next_one(tmp_path: Path) -> None:
    """Not of one with every page, which begins where its WAL does, nor of one that is unreadable."""
    captured = tmp_path / "capture" / "ltx" / "0"
    captured.mkdir(parents=True)

    def capture(txid: int, pages: int) -> Path:
        place = {"wal_offset": 100 * txid, "wal_size": 100, "wal_salt1": 7, "wal_salt2": 1}
        header = ltx.Header(page_size=512, commit=3, min_txid=txid, max_txid=txid, **place)
        path = captured / ltx.file_name(txid, txid)
        path.write_bytes(ltx.encode(header, [ltx.Page(number, bytes(512)) for number in range(1, pages + 1)]))
        return path

    capture(12, 2)
    newest = capture(14, 3)
    found = [CapturedFiles(tmp_path).place_after(txid) for txid in (10, 11, 12, 13, 14, 15)]
    assert found == [None, Place(7, 1, 1200), Place(7, 1, 1300), None, Place(7, 1, 1500), None]
    newest.write_bytes(b"")
    assert CapturedFiles(tmp_path).end_of(14) is None


@pytest.mark.parametrize("same_boot", [True, False])
async def test_database_that_is_kept_after_a_start_of_the_host_is_vouched_for(
    tmp_path: Path, same_boot: bool
) -> None:
    """Its WAL may go from now on; one whose disk has lost something is told of once, and captured anew."""
    vouched: list[bool] = []
    told: list[tuple[str, str]] = []

    async def vouch(*, is_whole: bool) -> None:
        vouched.append(is_whole)

    settlements = settlements_in(tmp_path, lambda action, reason, **_: told.append((action, reason)))
    settlements._database.replica = SimpleNamespace(vouch=vouch)  # type: ignore
    captured = tmp_path / ".wiki.db-phalanx" / "capture" / "ltx" / "0"
    captured.mkdir(parents=True)
    for txid in (12, 13):
        (captured / ltx.file_name(txid, txid)).touch()
    state = ReplicaState(role="live", state="live", position=Position(), epoch=3, same_boot=same_boot)
    local, logged = LocalDatabase(3, 13, 4), LoggedReign(10, 12, 3)
    await settlements._keep(state, logged, local, anew=False)  # pyright: ignore[reportPrivateUsage]
    assert vouched == ([] if same_boot else [True])
    assert not told
    await settlements.drop_captured(12)
    assert len(list(captured.iterdir())) == 2
    for _ in range(2):
        await settlements._keep(state, logged, local, anew=True)  # pyright: ignore[reportPrivateUsage]
    assert [action for action, _ in told] == ["database-truncated"]
    assert "unknown, at least 1; it goes on with those that are left, 4" in told[0][1]
    await settlements.drop_captured(12)
    assert not list(captured.iterdir())
    assert len(vouched) == (not same_boot)
