"""What was set aside is told whatever the disk does; nothing waits for a note that it was told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.data import disk
from phalanx.data.settlement import Settlements


def test_disk_is_full_when_an_earlier_life_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told at each start until the disk takes the note; the database is tended all the same."""
    told: list[str] = []
    database: Any = SimpleNamespace(
        live=tmp_path / "wiki.db",
        node="n1",
        app="wiki",
        report=lambda action, reason, **_: told.append(action),
    )
    settlements = Settlements(database)
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
