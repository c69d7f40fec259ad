"""Timelines of failovers from audit entries."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from opentelemetry.trace import StatusCode
from tests.spans import Spans

from phalanx.observe.audit import AuditEntry
from phalanx.observe.failover_spans import trace_failover
from phalanx.observe.failovers import failovers

_numbers = count()


def entry(time: float, node: str, name: str, epoch: int = 0, **more: Any) -> AuditEntry:
    """An entry of app wiki (of the node itself without an epoch)."""
    category, action = name.split(".")
    app = "wiki" if epoch else ""
    return AuditEntry(
        id=str(next(_numbers)),
        time=time,
        node=node,
        category=category,
        action=action,
        app=app,
        epoch=epoch,
        **more,
    )


FIRST = [
    entry(9.0, "n1", "node.session-lost", reason="another life of it"),
    entry(10.0, "n1", "app.leader-acquired", 3, duration_seconds=0.1, details={"how": ""}),
    entry(10.2, "n1", "app.active", 3, duration_seconds=0.2, details={"checks": "0"}),
]
CRASH = [
    entry(99.9, "n1", "node.fenced", reason="it stood still"),
    entry(
        100.0, "n2", "app.leader-acquired", 7, duration_seconds=0.02, reason="fenced",
        details={"previous": "n1", "previous_epoch": "3", "how": "session-over", "named": "no"},
    ),
    entry(100.1, "n2", "step.promote", 7, duration_seconds=0.1),
    entry(100.1, "n2", "app.database-promoted", 7, details={"missing": "unknown until n1 returns"}),
    entry(100.3, "n2", "step.ready", 7, duration_seconds=0.2),
    entry(100.3, "n2", "app.active", 7, duration_seconds=0.3, details={"checks": "1"}),
    entry(100.5, "n2", "app.first-healthy", 7, duration_seconds=0.5),
    entry(300.0, "n1", "app.database-diverged", 3, reason="2 transactions"),
]  # fmt: skip
HAND_OVER = [
    entry(500.0, "n2", "app.handing-over", 7, reason="asked; to n1"),
    entry(500.1, "n2", "app.standing-down", 7, reason="asked"),
    entry(500.4, "n2", "step.stop-backend", 7, duration_seconds=0.3),
    entry(500.5, "n2", "app.released", 7, duration_seconds=400.0, reason="asked; next: n1"),
    entry(
        500.6, "n1", "app.leader-acquired", 9, duration_seconds=0.05, reason="asked",
        details={"previous": "n2", "previous_epoch": "7", "how": "released", "named": "yes", "by": "ops"},
    ),
    entry(501.0, "n1", "app.activation-failed", 9, reason="no disk"),
]  # fmt: skip


def test_a_crash_from_its_end_seen_to_the_first_healthy_answer() -> None:
    """With each step and its duration, the totals, and what became of the database."""
    [_, found] = failovers([*FIRST, *CRASH])
    assert (found.id, found.node, found.previous, found.how) == ("wiki/7", "n2", "n1", "session-over")
    assert [(step.node, step.what) for step in found.steps] == [
        ("n1", "fenced"),
        ("n2", "session over, seen"),
        ("n2", "key taken"),
        ("n2", "step promote"),
        ("n2", "database-promoted"),
        ("n2", "step ready"),
        ("n2", "active"),
        ("n2", "first-healthy"),
    ]
    assert found.steps[0].offset_seconds == 0
    assert found.outcome == "active"
    assert found.vacant_seconds == 0.02
    assert round(found.activation_seconds or 0, 3) == 0.3
    assert round(found.healthy_seconds or 0, 3) == 0.5
    assert round(found.total_seconds or 0, 3) == 0.6
    assert found.missing == "unknown until n1 returns"
    assert found.loss == "database-diverged: 2 transactions"


def test_a_first_leader_without_checks_is_healthy_when_it_is_active() -> None:
    """And it followed nobody."""
    [found] = failovers(FIRST)
    assert (found.previous, found.how) == ("", "")
    assert round(found.healthy_seconds or 0, 3) == 0.2
    assert [step.what for step in found.steps] == ["key taken", "active"]


def test_a_hand_over_begins_when_it_was_asked_for_and_may_fail() -> None:
    """The end of the old section belongs to it, and its whole length to nothing."""
    found = failovers([*FIRST, *CRASH, *HAND_OVER])[-1]
    assert [step.what for step in found.steps] == [
        "handing-over", "standing-down", "step stop-backend", "released", "release seen", "key taken",
        "activation-failed",
    ]  # fmt: skip
    assert found.steps[0].offset_seconds == 0
    assert found.steps[3].duration_seconds is None
    assert (found.outcome, found.by, found.named) == ("failed", "ops", True)
    assert (found.activation_seconds, found.healthy_seconds, found.total_seconds) == (None, None, None)


def test_entries_of_an_older_version_give_what_they_have() -> None:
    """Without the details that came later."""
    old = [
        entry(1.0, "n1", "app.leader-acquired", 3, duration_seconds=0.1),
        entry(2.0, "n1", "app.active", 3),
    ]
    [found] = failovers(old, "wiki")
    assert (found.previous, found.outcome, found.healthy_seconds) == ("", "active", None)
    assert failovers(old, "other") == []


def test_trace_of_a_failover_has_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One span from the end that was seen to the first healthy answer; what took its time is inside of it."""
    spans = Spans(monkeypatch)
    for found in failovers([*FIRST, *CRASH, *HAND_OVER]):
        trace_failover(found)
    assert spans.one("activation wiki").parent is None
    crash, failed = spans.ended("failover wiki")
    assert (crash.start_time, crash.end_time) == (99_900_000_000, 100_500_000_000)
    assert crash.context is not None
    inside = [each for each in spans.ended() if each.parent and each.parent.span_id == crash.context.span_id]
    assert [each.name for each in inside] == [
        "key taken",
        "step promote",
        "step ready",
        "active",
        "first-healthy",
    ]
    assert (inside[1].start_time, inside[1].end_time) == (100_000_000_000, 100_100_000_000)
    assert [event.name for event in crash.events] == ["fenced", "session over, seen", "database-promoted"]
    attributes = crash.attributes or {}
    assert (attributes["phalanx.failover.id"], attributes["phalanx.previous"]) == ("wiki/7", "n1")
    assert failed.status.status_code is StatusCode.ERROR


def test_failover_costs_nothing_where_nothing_traces() -> None:
    """It is looked at, and no more."""
    for found in failovers(CRASH):
        trace_failover(found)
