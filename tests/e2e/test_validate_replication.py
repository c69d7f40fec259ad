"""``scripts/validate-replication.sh`` as it is called, and its checker where things are planted (G3, G8)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from benchmarks.replication_validation.chaos import Inflicted
from benchmarks.replication_validation.checker import Evidence, Sample, SetAside, figures, judge
from benchmarks.replication_validation.databases import Content, Replayed
from msgspec.structs import replace

from phalanx.data.entries import Seal, SealKind
from phalanx.observe.audit import AuditEntry
from phalanx.testing.history import Event
from phalanx.types import Position

ROOT = Path(__file__).parents[2]


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ("scripts/validate-replication.sh", *arguments)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.alone
@pytest.mark.timeout(280)
def test_g3_kills_of_the_writer_lose_nothing_confirmed_and_nothing_unreported() -> None:
    """Six failovers under load, from a seed: it says what it did, and that every promise was kept."""
    done = _script("--failovers", "6", "--seconds", "120", "--seed", "7", "--ttl", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--seed 7" in done.stdout.splitlines()[0]
    assert "inflicted: " in done.stdout
    assert "nothing confirmed was lost" in done.stdout


def test_bad_arguments_are_refused() -> None:
    """Exit code 2, and nothing is started."""
    assert _script("--failovers", "0").returncode == 2


# --- the checker


def _event(kind: str, at: float, epoch: int, number: int) -> Event:
    return Event(at, kind, "n1" if epoch == 4 else "n2", "wiki", epoch, {"number": number})


def _audit(action: str, node: str, epoch: int, **details: str) -> AuditEntry:
    return AuditEntry(
        id=f"{action}-{epoch}", time=0, node=node, category="app", action=action, epoch=epoch, details=details
    )


def _clean() -> Evidence:
    """n1 wrote rows 1 to 4 and was killed, rows 3 and 4 were not in the log yet; n2 wrote 3 anew."""
    logged = Content({1: (4, "n1"), 2: (4, "n1")}, vacuums=2, captures=1, fingerprint="a")
    final = replace(logged, rows=logged.rows | {3: (9, "n2")}, fingerprint="b")
    diverged = replace(logged, rows=logged.rows | {3: (4, "n1"), 4: (4, "n1")}, fingerprint="c")
    aside = SetAside("n1", 4, 5, transactions=2, exact=True, reported=True, file="d", content=diverged)
    written = [
        _event("opened", 1.0, 4, 0),
        *(_event("committed", 1 + n / 10, 4, n) for n in (1, 2, 3, 4)),
        _event("confirmed", 1.25, 4, 2),
        _event("opened", 2.0, 9, 2),
        _event("committed", 2.1, 9, 3),
    ]
    audit = [
        _audit("database-promoted", "n1", 4, missing="nothing"),
        _audit("database-promoted", "n2", 9, missing="unknown until n1 returns"),
        _audit("database-diverged", "n1", 4, file="d", transactions="2", exact="true"),
    ]
    seals = [Seal(1, 4, "n1", 0, SealKind.OPEN), Seal(6, 9, "n2", 4, SealKind.OPEN)]
    return Evidence(
        events=sorted(written, key=lambda event: event.at),
        audit=audit,
        replayed=Replayed(Position(7, 5), final, {5: logged}, seals, []),
        databases={"n1": final, "n2": final},
        aside=[aside],
        inflicted=[Inflicted("everything", "n1", 1.5, 4)],
        samples=[Sample("n2", 1.25, 1)],
        fingerprints={"n1": "b"},
    )


def test_checker_finds_nothing_in_a_clean_history_and_counts_what_a_kill_cost() -> None:
    """A loss that is kept and reported with its number is none that breaks a promise."""
    found = figures(_clean())
    assert judge(_clean()) == []
    assert (found.reigns, found.committed, found.confirmed) == (2, 5, 1)
    assert found.losses == {"everything": [2]}
    assert found.lag_ms == [pytest.approx(50)]


def _aside(**changes: Any) -> Evidence:
    clean = _clean()
    return replace(clean, aside=[replace(clean.aside[0], **changes)])


def _replayed(**changes: Any) -> Evidence:
    clean = _clean()
    return replace(clean, replayed=replace(clean.replayed, **changes))


def _planted() -> dict[str, tuple[Evidence, str]]:
    clean = _clean()
    final, audit = clean.replayed.final, list(clean.audit)
    diverged = clean.aside[0].content
    unsaid = replace(audit[1], details={"missing": "nothing"})
    wrong = replace(audit[2], details={"file": "d", "transactions": "3", "exact": "true"})
    closed = [*clean.replayed.seals, Seal(5, 4, "n1", 2, SealKind.CLOSE)]
    confirmed = [*clean.events, _event("confirmed", 1.6, 4, 3)]
    forgotten = replace(diverged, rows={n: row for n, row in diverged.rows.items() if n != 4})
    return {
        "confirmed row lost": (replace(clean, events=confirmed), "had confirmed are lost: 3"),
        "loss without a file": (replace(clean, aside=[]), "lost and in no file: 3 … 4"),
        "row missing in the file": (_aside(content=forgotten), "lost and in no file: 4"),
        "wrong number": (_aside(transactions=1), "not exactly 1"),
        "more than there are": (_aside(transactions=3, exact=False), "not at least 3"),
        "VACUUM not counted": (_aside(content=replace(diverged, vacuums=3)), "has 3 transactions more"),
        "never reported": (_aside(reported=False), "never reported"),
        "no audit entry": (replace(clean, audit=audit[:2]), "never reported"),
        "audit with another number": (replace(clean, audit=[*audit[:2], wrong]), "audit log says"),
        "promotion that hides it": (replace(clean, audit=[audit[0], unsaid, audit[2]]), "nothing is missing"),
        "promotion not audited": (replace(clean, audit=audit[1:]), "no promotion of epoch 4"),
        "file that is gone": (replace(clean, aside=[]), "is not there"),
        "closed in good order": (_replayed(seals=closed), "closed in good order"),
        "replica with other bytes": (
            replace(clean, databases={"n1": replace(final, fingerprint="x"), "n2": final}),
            "n1 is not what the log says",
        ),
        "node that says otherwise": (replace(clean, fingerprints={"n1": "x"}), "says of its replica"),
        "damaged database": (
            replace(clean, databases={"n2": replace(final, problems=("row 3 missing",))}),
            "database of n2: row 3 missing",
        ),
        "damaged file set aside": (_aside(content=Content({}, problems=("malformed",))), "malformed"),
        "torn read": (replace(clean, samples=[Sample("n2", 1.2, 1, ("half",))]), "reader on n2 saw: half"),
        "gap in the log": (_replayed(problems=["the log goes on at 9"]), "goes on at 9"),
    }


@pytest.mark.parametrize("name", list(_planted()))
def test_g3_checker_finds_what_was_planted(name: str) -> None:
    """Each kind of violation alone makes the verdict red, and is named."""
    evidence, expected = _planted()[name]
    assert expected in "\n".join(judge(evidence))
