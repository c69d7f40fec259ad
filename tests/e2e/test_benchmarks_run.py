"""``python -m benchmarks`` and the scripts around it, as they are called; with the smallest of runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.checker import Waking, judge
from benchmarks.figures import Benchmark, Peer, Run, bar_text, figures, percentile
from benchmarks.replication_programs import CELLS, cell, torn
from benchmarks.replication_stage import Program, lags

from phalanx.testing.history import Event

ROOT = Path(__file__).parents[2]
FIELDS = ["name", "unit", "n", "min", "median", "p95", "max", "bar", "peer", "ratio", "met"]


def _run(*command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, "-m", "benchmarks", *arguments)


def _benchmark(**changes: Any) -> Benchmark:
    async def measure(run: Run) -> None: ...

    fields: dict[str, Any] = {
        "name": "b",
        "work": "w",
        "unit": "ms",
        "bar": 10,
        "measure": measure,
        "runs": 4,
    }
    return Benchmark(**(fields | changes))


def _figures(values: list[float], **changes: Any) -> Any:
    run = Run("b", len(values))
    run.values = values
    return figures(_benchmark(**changes), run)


def test_json_is_one_object_a_line_and_the_exit_code_says_whether_the_bars_are_met() -> None:
    """A real failover, measured twice: two objects would be two lines, each with all fields in order."""
    done = _bench("failover.sigkill", "kv.put", "--runs", "2", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["name"] for each in found] == ["failover.sigkill", "kv.put"], done.stderr
    for each in found:
        assert list(each) == FIELDS
        assert each["n"] == 2
        assert 0 < each["min"] <= each["median"] <= each["p95"] <= each["max"]
        assert each["ratio"] > 0
    assert done.returncode == (0 if all(each["met"] for each in found) else 1)
    assert "1/2: " in done.stderr


def test_unknown_name_is_refused_with_the_nearest_right_one() -> None:
    """Exit code 2, one line that says what was meant, and nothing is measured."""
    done = _bench("failover.sigkil", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean failover.sigkill?" in done.stderr
    assert _bench("kv.put", "--runs", "0").returncode == 2


def test_bar_is_for_the_median_and_the_largest_where_it_says_so() -> None:
    """Met up to the bar, missed above it; a largest value above its own bar misses too."""
    assert _figures([1, 10, 99]).met
    assert not _figures([1, 10.5, 99]).met
    assert not _figures([1, 10, 99], max_bar=50).met
    assert _figures([0, 0], bar=0, max_bar=0).met


def test_ratio_is_median_to_peer_and_can_be_what_the_bar_is_for() -> None:
    """The peer's own figure stays beside ours; without a peer there is no ratio."""
    found = _figures([2, 4, 6], bar=1.15, bar_of="ratio", peer=Peer("raw", 4, given=False))
    assert (found.ratio, found.met, found.peer) == (1.0, True, 4)
    assert not _figures([5], bar=1.15, bar_of="ratio", peer=Peer("raw", 4)).met
    assert _figures([5]).ratio is None


def test_bars_of_percentile_and_ratio_have_to_be_met_besides() -> None:
    """A percentile can be what the bar is for, or a second bar like the ratio; one missed misses all."""
    values = [1.0] * 18 + [30.0, 40.0]
    assert _figures(values, bar_of="p95", bar=30).met
    assert not _figures(values, bar_of="p95", bar=29).met
    assert not _figures(values, p95_bar=29).met
    assert _figures(values, p95_bar=30, ratio_bar=0.02, peer=Peer("other", 50)).met
    assert not _figures(values, ratio_bar=0.02, peer=Peer("other", 49)).met
    assert not _figures(values, ratio_bar=0.02).met
    assert bar_text(_benchmark(p95_bar=20, ratio_bar=0.02)) == "<= 10, p95 <= 20, <= 0.02x"


def test_torn_read_is_seen_as_one() -> None:
    """Rows of two transactions, too few rows, or another content than the transaction's are found."""
    rows = [(place, 7, cell(7, place)) for place in range(CELLS)]
    assert torn(rows) == torn([]) == ""
    assert "[7, 8]" in torn([*rows[1:], (0, 8, cell(8, 0))])
    assert torn(rows[1:]) != ""
    assert "cells [0]" in torn([(0, 7, cell(6, 0)), *rows[1:]])


def test_lag_of_a_commit_ends_with_the_first_look_that_shows_it() -> None:
    """A look may show several commits at once; one that no look has shown has no lag."""
    written, read = _Noted((0, 0.0, "begin"), (1, 1.0, ""), (2, 1.1, ""), (3, 1.2, "")), _Noted((2, 1.5, ""))
    assert lags(written, read) == [(1, 500.0), (2, pytest.approx(400.0))]


class _Noted(Program):
    """The notes of a program that has ended."""

    def __init__(self, *notes: tuple[int, float, str]) -> None:
        self._noted = list(notes)

    def notes(self) -> list[tuple[int, float, str]]:
        return self._noted


def test_replica_process_killed_under_load_measured_by_the_script() -> None:
    """A real pair of nodes: the kill leaves a consistent replica, and in the end both have equal pages."""
    done = _run("scripts/benchmark-replication.sh", "replication.torn", "--runs", "1", "--json")
    found = json.loads(done.stdout)
    assert (found["name"], found["n"], found["max"]) == ("replication.torn", 1, 0), done.stderr
    listed = _run("scripts/benchmark-replication.sh", "--list").stdout
    assert "replication.lag" in listed
    assert _run("scripts/benchmark-replication.sh", "replication.nothing").returncode == 2


def test_no_values_or_a_problem_miss_the_bar() -> None:
    """A benchmark that measured nothing, or found something wrong besides, never counts as met."""
    assert not _figures([]).met
    run = Run("b", 1)
    run.values, run.problems = [1], ["a planted break was not found"]
    assert not figures(_benchmark(), run).met


def test_percentile_is_a_value_that_occurred() -> None:
    """Nearest rank: the largest of ten, the 19th of twenty."""
    assert percentile([float(n) for n in range(1, 11)], 95) == 10
    assert percentile([float(n) for n in range(1, 21)], 95) == 19


def _reign(node: str, epoch: int, begin: float, end: float) -> list[Event]:
    return [Event(begin, "active", node, "wiki", epoch), Event(end, "tick", node, "wiki", epoch)]


def _written(epoch: int, number: int, revision: int) -> Event:
    data = {"key": f"write.{epoch}.{number}", "revision": revision}
    return Event(0.5, "written", "n1", "wiki", epoch, data)


def test_checker_finds_overlaps_late_writes_and_lost_writes() -> None:
    """Each kind of violation is found where it is planted, and a clean history has none."""
    clean = [*_reign("n1", 5, 0, 1), *_reign("n2", 9, 1.1, 2), _written(5, 1, 6)]
    assert judge(clean, {"write.5.1": 6, "write.9.1": 10}).problems == ()
    overlap = judge([*_reign("n1", 5, 0, 1.2), *_reign("n2", 9, 1.1, 2)], {})
    assert "before n1" in overlap.problems[0]
    assert "G2" in judge(clean, {"write.5.1": 6, "write.5.2": 10}).problems[0]
    assert "lost" in judge(clean, {}).problems[0]


def test_checker_excuses_a_continued_host_for_a_moment_only() -> None:
    """Signs of life right after SIGCONT of node and keeper are counted apart; later ones are an overlap."""
    events = [*_reign("n1", 5, 0, 1), *_reign("n2", 9, 1.1, 9), Event(3.01, "tick", "n1", "wiki", 5)]
    assert judge(events, {}).problems != ()
    excused = judge(events, {}, [Waking("n1", 3.0)])
    assert (excused.problems, excused.excused) == ((), 1)
    assert judge(events, {}, [Waking("n1", 2.0)]).problems != ()


def test_validation_script_runs_and_is_reproducible_by_its_seed() -> None:
    """A few seconds of faults: it prints the seed to repeat them, what it did, and that all held."""
    done = _run("scripts/validate-election.sh", "--seconds", "4", "--seed", "7", "--ttl", "1", timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--seed 7" in done.stdout.splitlines()[0]
    assert "no overlap" in done.stdout
    assert _run("scripts/validate-election.sh", "--ttl", "0").returncode == 2


def test_failover_script_takes_the_same_arguments() -> None:
    """The script measures every failover.* by default, and what it is told otherwise."""
    done = _run("scripts/benchmark-failover.sh", "failover.nothing")
    assert done.returncode == 2
    assert "failover.nothing" in done.stderr
    assert "failover.freeze" in _run("scripts/benchmark-failover.sh", "--list").stdout
