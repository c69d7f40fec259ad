"""What was set aside is told whatever the disk does, and as much of its number as is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.data import disk, ltx
from phalanx.data.settlement import Settlements


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


def test_captured_files_that_the_log_lacks_are_a_lower_bound(tmp_path: Path) -> None:
    """Each holds a transaction; one with every page may hold nothing new, a damaged one tells nothing."""
    settlements = settlements_in(tmp_path, lambda *_, **__: None)
    captured = tmp_path / ".wiki.db-phalanx" / "capture" / "ltx" / "0"
    captured.mkdir(parents=True)

    def capture(txid: int, pages: int, *, damaged: bool = False) -> None:
        header = ltx.Header(page_size=512, commit=3, min_txid=txid, max_txid=txid)
        data = ltx.encode(header, [ltx.Page(number, bytes(512)) for number in range(1, pages + 1)])
        (captured / ltx.file_name(txid, txid)).write_bytes(data[: -20 if damaged else None])

    for txid in (11, 12, 13, 14):
        capture(txid, 2)
    capture(15, 3)
    capture(16, 2, damaged=True)
    assert settlements._files_after(12) == 2  # pyright: ignore[reportPrivateUsage]
    assert settlements._files_after(16) == 0  # pyright: ignore[reportPrivateUsage]


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
