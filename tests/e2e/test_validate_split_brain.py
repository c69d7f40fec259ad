"""``scripts/validate-split-brain.sh`` as it is called, and its checker with things planted (G1, G2, G3)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from benchmarks.split_brain.checker import judge
from msgspec.structs import replace

from phalanx.testing.history import Event

ROOT = Path(__file__).parents[2]


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ("scripts/validate-split-brain.sh", *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_g1_g2_g3_network_faults_freezes_and_kills_on_five_hosts() -> None:
    """A minute of faults from a seed: nobody sees two, nothing confirmed is lost, the majority is served.

    How much it is served is measured in ten minutes: in one, a single election of NATS is a tenth.
    """
    done = _script("--seconds", "60", "--seed", "1", "--available", "50")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--seed 1" in done.stdout.splitlines()[0]
    assert "faults: " in done.stdout
    assert "nobody saw two" in done.stdout


def test_bad_arguments_are_refused() -> None:
    """Exit code 2, and nothing is started."""
    assert _script("--seconds", "0").returncode == 2


# --- the checker


def _answer(client: str, epoch: int, at: float, **changes: Any) -> Event:
    """An answer that took 20 ms."""
    node = changes.pop("node", "n1" if epoch == 4 else "n2")
    data = {"client": client, "way": "service", "sent": at - 0.01, "began": at - 0.001, "at": at, "last": 1}
    return Event(changes.pop("received", at + 0.01), "answer", node, "wiki", epoch, data | changes)


def _written(client: str, epoch: int, at: float, number: int, **changes: Any) -> Event:
    row = {"way": "write", "id": f"{client}-{number}", "number": number, "confirmed": True, "last": None}
    return _answer(client, epoch, at, **(row | changes))


def _silence(client: str, at: float) -> Event:
    return Event(at + 1, "silence", "", "wiki", 0, {"client": client, "way": "service", "sent": at})


def _clean() -> list[Event]:
    """n1 answers two clients, c3 is cut off, n1 is lost; n2 goes on 2 s later."""
    return [
        Event(0.5, "majority", data={"clients": ["c1", "c3"]}),
        _answer("c1", 4, 1.0),
        _written("c1", 4, 1.2, 2),
        _answer("c3", 4, 1.3, last=2),
        Event(1.9, "majority", data={"clients": ["c1"]}),
        _silence("c1", 2.0),
        _silence("c3", 2.0),
        _written("c1", 9, 4.0, 3),
        _answer("c1", 9, 4.0, last=2),
        _answer("c1", 9, 5.0, last=3),
        _answer("c3", 9, 5.1, last=3),
        Event(5.2, "majority", data={"clients": ["c1", "c3"]}),
    ]


STORED = {"c1-2": 2, "c1-3": 3, "c3-9": 4}


def test_checker_finds_nothing_in_a_clean_history_and_counts_what_the_majority_was_answered() -> None:
    """What a client outside of the majority was not answered does not count; a failover does."""
    verdict = judge(_clean(), STORED)
    assert verdict.problems == ()
    assert (verdict.reigns, verdict.answers, verdict.confirmed, verdict.excused) == (2, 7, 2, 0)
    # c1: 3 of 4 answered; c3: the one before it was cut off.
    assert (verdict.asked, verdict.availability) == (5, pytest.approx(0.8))
    assert verdict.longest_silence_seconds == pytest.approx(4.01 - 1.01)


def _planted() -> dict[str, tuple[list[Event], dict[str, int], str]]:
    clean = _clean()
    return {
        "old one answers another client": (
            [*clean, _answer("c3", 4, 4.5, sent=3.5)],
            STORED,
            "n1 (epoch 4) answered c3 (service) at 4.500, 500 ms or more after n2 (epoch 9) had",
        ),
        "old one answers at its own address": (
            [*clean, _answer("c3", 4, 4.5, sent=3.5, way="host")],
            STORED,
            "answered c3 (host)",
        ),
        "epoch goes back for a client": (
            [*clean, _answer("c1", 4, 3.9, sent=4.2, began=3.9, received=4.3)],
            STORED,
            "c1 was answered by n1 (epoch 4) what it asked at 4.200, after epoch 9",
        ),
        "two of one epoch": (
            [*clean, _answer("c1", 9, 4.4, node="n3", last=3)],
            STORED,
            "n3 (epoch 9) and n2 (epoch 9) have answered under one epoch",
        ),
        "confirmed row lost": (clean, {"c1-3": 3}, "row 2 (c1-2), which n1 (epoch 4) had confirmed, is lost"),
        "confirmed row is another one": (clean, STORED | {"c1-3": 5}, "is lost: row 5"),
        "confirmed row not shown": (
            [*clean, _answer("c3", 9, 5.15, last=1)],
            STORED,
            "without row 3, which was confirmed before: its last one is 1",
        ),
    }


@pytest.mark.parametrize("name", list(_planted()))
def test_g1_g2_g3_checker_finds_what_was_planted(name: str) -> None:
    """Each kind of violation makes the verdict red, and is named."""
    events, stored, expected = _planted()[name]
    assert expected in "\n".join(judge(events, stored).problems)


WAKING = Event(4.45, "waking", "n1", data={"frozen_at": 3.0, "program": True})


@pytest.mark.parametrize(
    ("waking", "late", "excused"),
    [
        (WAKING, _answer("c3", 4, 4.5, sent=3.5), True),
        (WAKING, _answer("c3", 4, 4.99, sent=3.5), False),
        (WAKING, _answer("c3", 4, 4.5, sent=3.5, node="n5"), False),
        (replace(WAKING, data={"frozen_at": 3.0, "program": False}), _answer("c3", 4, 4.5, sent=3.5), False),
        (
            replace(WAKING, data={"frozen_at": 3.0, "program": False}),
            _answer("c3", 4, 4.2, sent=3.5, way="host"),
            True,
        ),
    ],
    ids=["just woken", "too late", "another node", "program ran on", "program ran on, asked there"],
)
def test_checker_excuses_the_documented_window_and_no_more(waking: Event, late: Event, excused: bool) -> None:
    """A host that was stopped as a whole may answer for a moment; its address alone does not last."""
    verdict = judge([*_clean(), waking, late], STORED)
    assert (verdict.problems == (), verdict.excused) == (excused, int(excused))


def test_checker_of_a_service_that_never_ran() -> None:
    """Nothing is available where nobody answers, or nobody asks."""
    events = [Event(0.0, "majority", data={"clients": ["c1"]}), *(_silence("c1", t) for t in (1.0, 2.0))]
    assert (judge(events, {}).availability, judge(events, {}).asked) == (0.0, 2)
    assert judge(events[:1], {}).availability == 0.0
