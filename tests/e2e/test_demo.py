"""The demo: it runs, it cleans up, and it would notice a broken promise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from examples.demo.client import Answer, outages
from examples.demo.ledger import Ledger, Rows, SetAside
from examples.demo.node import RUN_MARK
from examples.demo.programs import Programs
from examples.demo.promises import FAULTS, Outcome, judge, judge_rows
from examples.wiki import platform

from phalanx import system
from phalanx.config import load_toml
from phalanx.testing.nats import NatsServer, Ports
from phalanx.testing.nodes import NodeProcess

ROOT = Path(__file__).parents[2]

GOOD = Outcome("kill", "n1", 1, "n2", 5, "killed with its node", takeover=0.1, program_start=0.2, outage=0.3)
UNMOVED = Outcome("nats", "n1", 5, "n1", 5, "goes on")


@pytest.fixture
def own_temp() -> Iterator[Path]:
    """A folder for temporary files of the demo alone, so that a test sees what it leaves.

    Its path is short, so that sockets can be in it."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        yield Path(folder)


def start_demo(temp: Path, *arguments: str) -> subprocess.Popen[str]:
    """The demo as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "examples.demo", "--json", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temp)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(temp: Path) -> list[str]:
    """Processes that run in or with that folder, and files in it."""
    found = [str(path) for path in temp.iterdir()]
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:
                continue
            if os.fsencode(temp) in text:
                found.append(f"process {folder.name}")
    return found


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Ask every 10 ms until it is so, at most *seconds*."""
    deadline, pause = system.now() + seconds, threading.Event()
    while not condition():
        if system.now() > deadline:
            return False
        pause.wait(0.01)
    return True


@pytest.mark.alone
def test_demo_keeps_its_promises_and_leaves_nothing(own_temp: Path) -> None:
    """One fault for real: exit code 0, who took over, a growing epoch, no process and no file left."""
    outcome = play(own_temp, "kill")
    assert outcome["before"] != outcome["after"]
    assert outcome["epoch_after"] > outcome["epoch_before"]
    assert outcome["failed_requests"] > 0


@pytest.mark.alone
def test_demo_loses_no_confirmed_row_g3(own_temp: Path) -> None:
    """Datasette's host loses its power for real: rows were confirmed, whatever is lost was set aside."""
    outcome = play(own_temp, "db-power")
    assert outcome["before"] != outcome["after"]
    rows = outcome["rows"]
    assert rows["acknowledged"] >= rows["confirmed"] > 0
    assert rows["lost"] <= rows["set_aside"]


@pytest.mark.alone
def test_demo_moves_a_virtual_address(own_temp: Path) -> None:
    """A crash, a hand-over and a pulled cable, each seen by the client; nothing is left."""
    demo = start_demo(own_temp, "--only", "vip")
    output, errors = demo.communicate(timeout=200)
    assert demo.returncode == 0, output + errors
    said = [json.loads(line).get("what", "") for line in output.splitlines()]
    assert sum("; outage" in what for what in said) == 3, output
    assert left_behind(own_temp) == []


def test_demo_without_network_namespaces_says_so(own_temp: Path) -> None:
    """Where they cannot be had, the part is left out, with the reason."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--only", "vip"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(own_temp), "PATH": str(own_temp)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "left out here: network namespaces need" in done.stdout


def play(temp: Path, fault: str) -> dict[str, Any]:
    """The outcome of a demo with only that fault; it kept its promises and left nothing."""
    demo = start_demo(temp, "--only", fault)
    output, errors = demo.communicate(timeout=150)
    assert demo.returncode == 0, output + errors
    events: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert events[-1]["kept"] is True
    assert left_behind(temp) == []
    return next(event for event in events if event.get("fault") == fault)


def test_interrupted_demo_leaves_nothing(own_temp: Path) -> None:
    """Ctrl-C while nodes run (and again, while it cleans up): exit code 130, nothing left."""
    demo = start_demo(own_temp)
    # As soon as a node has a NATS server there is all that could be left behind.
    assert wait_until(lambda: list(own_temp.glob("*/n*/data/nats/server.json")), 60)
    assert len(left_behind(own_temp)) > 3
    demo.send_signal(signal.SIGINT)
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert left_behind(own_temp) == []


def test_good_outcomes_are_kept() -> None:
    """What is within the bounds is no broken promise."""
    assert judge(GOOD).is_kept
    assert judge(UNMOVED).is_kept


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"after": ""}, "nobody took over"),
        ({"after": "n1"}, "nobody else took over"),
        ({"epoch_after": 1}, "epoch did not grow"),
        ({"takeover": 0.6}, "the new program was started after 600 ms"),
        ({"takeover": 0.8, "waited_for_cpu": 9.0}, "the new program was started after 800 ms"),
        ({"takeover": None}, "never seen"),
        ({"outage": 1.0}, "the client saw 1,000 ms"),
    ],
)
def test_broken_promise_is_noticed(change: dict[str, Any], problem: str) -> None:
    """Each way in which a failover can break its promise."""
    broken = judge(msgspec.structs.replace(GOOD, **change)).broken
    assert any(problem in each for each in broken), broken


def test_failover_by_nats_is_noticed() -> None:
    """A NATS server's death must move nothing and fail no request."""
    moved = judge(msgspec.structs.replace(UNMOVED, after="n2", epoch_after=7))
    assert "it caused a failover" in moved.broken[0]
    failed = judge(msgspec.structs.replace(UNMOVED, failed_requests=1, outage=0.02))
    assert "1 requests failed" in failed.broken[0]


def test_overlap_breaks_any_fault() -> None:
    """Two programs at once break the promise, whatever else went well."""
    for fault in FAULTS:
        good = UNMOVED if fault.bound_seconds is None else msgspec.structs.replace(GOOD, fault=fault.key)
        assert judge(good, ("both ran",)).broken == ("both ran",)


ACKNOWLEDGED = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}


def account(present: set[int], set_aside: SetAside | None, *, may_lose: bool = True) -> Rows:
    """Rows 1 and 2 were confirmed before a fault at 3.5; *present* are there afterwards."""
    return Ledger().account(
        ACKNOWLEDGED,
        frozenset(present),
        confirmed_before=2.5,
        until=3.5,
        may_lose=may_lose,
        set_aside=set_aside,
    )


def aside(rows: set[int], transactions: int, *, exact: bool = True) -> SetAside:
    """What the returning node says."""
    return SetAside("n1", 3, transactions, exact, "notes.db.diverged-3", frozenset(rows))


@pytest.mark.parametrize(
    ("present", "set_aside", "may_lose"),
    [
        ({1, 2, 3, 4}, None, False),
        ({1, 2, 3, 4}, aside(set(), 0), True),
        ({1, 2, 4}, aside({1, 2, 3, 9}, 2), True),
        ({1, 2, 4}, aside({1, 2, 3, 9}, 1, exact=False), True),
    ],
)
def test_rows_that_may_be_lost_are_no_broken_promise(
    present: set[int], set_aside: SetAside | None, may_lose: bool
) -> None:
    """All are there; or one that was not confirmed, and one without an answer, are in the file, counted."""
    rows = account(present, set_aside, may_lose=may_lose)
    assert rows.broken == ()
    assert (rows.acknowledged, rows.confirmed, rows.lost) == (3, 2, len(ACKNOWLEDGED.keys() - present))


@pytest.mark.parametrize(
    ("present", "set_aside", "may_lose", "problem"),
    [
        ({1, 3, 4}, aside({1, 2, 3}, 1), True, "a barrier had confirmed are gone: 2 (G3)"),
        ({1, 2, 4}, None, False, "rows that were acknowledged are gone: 3"),
        ({1, 2, 4}, None, True, "did not say what it had"),
        ({1, 2, 4}, aside(set(), 0), True, "are in no file that was set aside: 3"),
        ({1, 2, 4}, aside({1, 2, 3, 9}, 1), True, "has 2 rows that the program lacks"),
    ],
)
def test_lost_row_is_noticed(
    present: set[int], set_aside: SetAside | None, may_lose: bool, problem: str
) -> None:
    """Each way in which a row can be lost against the promise, and the fault counts as broken."""
    outcome = judge_rows(judge(GOOD), account(present, set_aside, may_lose=may_lose))
    assert any(problem in each for each in outcome.broken), outcome.broken
    assert not outcome.is_kept


def test_lost_row_counts_once() -> None:
    """A row that an earlier fault has taken is not lost again by the next one."""
    ledger = Ledger()
    first = ledger.account(
        {1: 1.0, 2: 2.0},
        frozenset({1}),
        confirmed_before=0,
        until=2,
        may_lose=True,
        set_aside=aside({1, 2}, 1),
    )
    second = ledger.account(
        {1: 1.0, 2: 2.0, 3: 3.0},
        frozenset({1, 3}),
        confirmed_before=3.5,
        until=4,
        may_lose=False,
        set_aside=None,
    )
    assert (first.lost, second.lost, second.acknowledged, second.broken) == (1, 0, 1, ())


def test_programs_that_run_at_once_are_seen(tmp_path: Path) -> None:
    """Two real processes of different epochs: one after the other is fine, both at once is an overlap."""
    run = tmp_path.name

    def start(epoch: int) -> subprocess.Popen[bytes]:
        env = {RUN_MARK: run, "PHALANX_NODE": f"n{epoch}", "PHALANX_EPOCH": str(epoch)}
        return subprocess.Popen(["/bin/sleep", "60"], env=env)

    with Programs(run) as programs:
        first = start(1)
        assert wait_until(lambda: [p.epoch for p in programs.running()] == [1], 5)
        first.kill()
        first.wait()
        second = start(2)
        assert wait_until(lambda: [p.epoch for p in programs.running()] == [2], 5)
        assert programs.overlaps == []
        third = start(3)
        assert wait_until(lambda: programs.overlaps, 5)
        for process in (second, third):
            process.kill()
            process.wait()
        assert wait_until(lambda: programs.running() == [], 5)
    assert "n2 (epoch 2) and n3 (epoch 3) ran at once" in str(programs.overlaps[0])


def test_outage_is_from_answer_to_answer() -> None:
    """Failed requests between two answers are one outage, from the end of the one to that of the other."""
    answers = [Answer(0.0, 0.1, "n1"), Answer(0.2, 0.21, ""), Answer(0.3, 0.31, ""), Answer(0.4, 0.5, "n2")]
    (outage,) = outages(answers, 9.0)
    assert (outage.began, outage.ended, outage.failed) == (0.1, 0.5, 2)
    (lasting,) = outages(answers[:3], 9.0)
    assert (lasting.ended, lasting.failed) == (9.0, 2)
    assert outages(answers[:1], 9.0) == []


def test_examples_are_valid() -> None:
    """The ten lines of the README and the example file are correct declarations."""
    assert list(platform.apps) == ["wiki"]
    config, apps = load_toml(ROOT / "examples" / "phalanx.toml")
    assert (config.name, [app.name for app in apps]) == ("prod", ["wiki"])


def test_notes_are_confirmed_and_stay(tmp_path: Path, nats_server: NatsServer) -> None:
    """The example with a database: two lives of a node, numbers go on, SIGTERM ends it with 0."""
    databases = tmp_path / "databases"
    databases.mkdir()
    ports = Ports()
    env = {"PHALANX_NATS": nats_server.url(), "PHALANX_DATABASES": str(databases), "PYTHONPATH": str(ROOT)}
    node = NodeProcess((sys.executable, "-m", "examples.notes"), "n1", tmp_path / "n1", ports.take(), env)
    try:
        for number in (1, 2):
            node.start()
            assert wait_until(lambda wanted=f"note {number} is confirmed at ": wanted in node.log(), 60), (
                node.log()
            )
            node.terminate()
            assert node.wait(60) == 0, node.log()
    finally:
        node.stop()
        ports.close()
