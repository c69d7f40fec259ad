"""What an app says of itself, and that saying it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx import Platform
from phalanx.data.database import AppDatabase


def test_status_that_is_asked_for_while_a_replica_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who only looks does not count as told: else the change would never reach the app's role."""
    app = Platform("test", node="n1", nats="nats://127.0.0.1:1").app("wiki")
    database = object.__new__(AppDatabase)
    reasons = ["its replica is behind", ""]
    monkeypatch.setattr(AppDatabase, "_ineligible", lambda _: reasons[0])
    monkeypatch.setattr(AppDatabase, "brief", lambda _: None)
    election: Any = type("Election", (), {"named": "", "leader": None})()
    candidacy = vars(app)["_candidacy"]
    candidacy.database, candidacy.contest = database, election

    assert database.ineligible_because() == "its replica is behind"
    reasons.pop(0)
    assert app.status().standing.eligible
    assert vars(database)["_told"] == "its replica is behind"
