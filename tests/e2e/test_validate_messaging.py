"""``scripts/validate-messaging.sh`` as it is called, and its checker where things are planted."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.messaging_validation.__main__ import too_little
from benchmarks.messaging_validation.checker import Evidence, figures, judge
from msgspec.structs import replace

from phalanx.testing.history import Event

ROOT = Path(__file__).parents[2]


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ("scripts/validate-messaging.sh", *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.alone
@pytest.mark.timeout(280)
def test_kills_and_hand_overs_repeat_nothing_lose_nothing_and_let_nobody_in_beside_another() -> None:
    """Twenty seconds of faults under load, from a seed: it says what it did, and that all was kept."""
    done = _script("--seconds", "20", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--seed 7" in done.stdout.splitlines()[0]
    assert "inflicted: " in done.stdout
    assert "nothing ran twice" in done.stdout


def test_bad_arguments_are_refused() -> None:
    """Exit code 2, and nothing is started."""
    assert _script("--seconds", "0").returncode == 2


# --- the checker


def _event(at: float, kind: str, node: str, app: str, epoch: int = 0, **data: Any) -> Event:
    return Event(at, kind, node, app, epoch, data)


def _clean() -> list[Event]:
    """n1 leads under 4, then n2 under 9; c1 calls; one lock and one semaphore go round; a partition moves."""
    return [
        _event(1.0, "called", "c1", "orders", id="a", method="place"),
        _event(1.1, "placed", "n1", "orders", 4, id="a"),
        _event(1.2, "answered", "c1", "orders", 4, id="a", method="place"),
        _event(1.3, "called", "c1", "orders", id="b", method="place"),
        _event(1.4, "failed", "c1", "orders", id="b", code="no-leader", started=False),
        _event(2.0, "published", "n1", "orders", 4, key="k", number=1),
        _event(2.1, "published", "n1", "orders", 4, key="k", number=2),
        _event(2.2, "handled", "n1", "k", 4, number=1),
        _event(2.3, "handled", "n2", "k", 4, number=1),
        _event(3.0, "looked", "n2", "orders", 9, id="c"),
        _event(3.1, "answered", "c1", "orders", 9, id="c", method="look"),
        _event(3.2, "handled", "n2", "k", 9, number=1),
        _event(4.0, "held", "n1/0", "lock", 20),
        _event(4.1, "holding", "n1/0", "lock", 20),
        _event(4.2, "held", "c1/l", "lock", 22),
        _event(5.0, "held", "n1/0", "permits", 30),
        _event(5.1, "held", "n2/0", "permits", 31),
        _event(5.2, "holding", "n1/0", "permits", 30),
        _event(5.3, "holding", "n2/0", "permits", 31),
        _event(5.4, "held", "n2/1", "permits", 33),
        _event(6.0, "touched", "n1", "sessions", 40, partition=3, id="d"),
        _event(6.1, "touched", "n2", "sessions", 44, partition=3, id="e"),
    ]


def _evidence(*more: Event, without: Callable[[Event], bool] = lambda event: False) -> Evidence:
    events = sorted([*(e for e in _clean() if not without(e)), *more], key=lambda event: event.at)
    return Evidence(events, frozenset({("k", 4, 2)}), {"lock": 1, "permits": 2})


def test_checker_finds_nothing_in_a_clean_history() -> None:
    """Dead letters, repetitions of events, a call that was not begun: nothing of that breaks a promise."""
    assert judge(_evidence()) == []
    found = figures(_evidence())
    assert (found.called, found.answered, found.failed, found.reigns) == (2, 2, {"no-leader": 1}, 2)
    assert (found.published, found.handled, found.dead) == (2, 3, 1)
    assert found.grants == {"lock": 2, "permits": 3}


def _planted() -> dict[str, tuple[Evidence, str]]:
    return {
        "carried out twice": (_evidence(_event(1.15, "placed", "n1", "orders", 4, id="a")), "2 times"),
        "answered, never carried out": (
            _evidence(without=lambda e: e.kind == "placed"),
            "a was answered under epoch 4, not carried out",
        ),
        "answer of another epoch": (
            _evidence(_event(3.5, "answered", "c2", "orders", 9, id="a", method="place")),
            "a was answered under epoch 9",
        ),
        "said not to be begun": (
            _evidence(_event(1.35, "placed", "n1", "orders", 4, id="b")),
            "b was carried out, but its caller",
        ),
        "deposed leader carries out": (
            _evidence(_event(3.05, "looked", "n1", "orders", 4, id="x")),
            "n1 carried a call out under epoch 4, after n2 did under 9",
        ),
        "two leaders of one epoch": (
            _evidence(_event(3.05, "looked", "n3", "orders", 9, id="x")),
            "n3 and n2 carried calls out under epoch 9",
        ),
        "epoch goes back for a caller": (
            _evidence(_event(3.5, "answered", "c1", "orders", 4, id="a", method="place")),
            "took an answer of epoch 4 after one of 9",
        ),
        "event lost": (
            replace(_evidence(), dead=frozenset()),
            "event (4, 2) of key k was acknowledged, and neither handled",
        ),
        "events out of order": (
            _evidence(_event(3.3, "handled", "n2", "k", 4, number=2)),
            "event (4, 2) of key k was handled for the first time after (9, 1)",
        ),
        "two hold the lock": (
            _evidence(_event(4.3, "holding", "n1/0", "lock", 20)),
            "lock: held by c1/l (token 22) beside n1/0 (token 20)",
        ),
        "token goes back": (
            _evidence(_event(4.5, "held", "n2/0", "lock", 21)),
            "token 21 was granted after 22",
        ),
        "one token for two": (_evidence(_event(4.5, "held", "n2/0", "lock", 22)), "have the token 22"),
        "one permit too many": (
            _evidence(
                _event(5.5, "holding", "n1/0", "permits", 30), _event(5.5, "holding", "n2/0", "permits", 31)
            ),
            "permits: held by n2/1 (token 33) beside",
        ),
        "two owners of a partition": (
            _evidence(_event(6.2, "touched", "n3", "sessions", 44, partition=3, id="f")),
            "partition 3: n3 and n2 answer under epoch 44",
        ),
        "former owner answers": (
            _evidence(_event(6.2, "touched", "n1", "sessions", 40, partition=3, id="f")),
            "partition 3: n1 answers under 40, n2 did under 44",
        ),
    }


@pytest.mark.parametrize("name", list(_planted()))
def test_checker_finds_what_was_planted(name: str) -> None:
    """Each kind of violation alone makes the verdict red, and is named."""
    evidence, expected = _planted()[name]
    assert expected in "\n".join(judge(evidence))


def test_a_run_in_which_nothing_happens_is_no_success() -> None:
    """Without answers, reigns, events and grants every promise is kept; that is a problem."""
    empty = Evidence([], frozenset(), {})
    assert judge(empty) == []
    problems = "\n".join(too_little(figures(empty), 20))
    for what in (
        "calls were answered only",
        "only 0 reigns",
        "events were published",
        "imports was granted only",
    ):
        assert what in problems
