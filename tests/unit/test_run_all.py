"""Several pytest processes that share the tests (tests/run_all.py), as ``make test`` runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

GOOD = """
import os
import pathlib
import pytest

NOTES = pathlib.Path(__file__).parent / "notes"

@pytest.fixture(scope="module")
def pid():
    return os.getpid()

@pytest.mark.parametrize("n", range(3))
def test_passes(n, pid):
    with NOTES.open("a") as file:
        file.write(f"{pathlib.Path(__file__).name} {pid}\\n")
"""
ALONE = """
import pathlib
import pytest

@pytest.mark.alone
def test_alone():
    assert (pathlib.Path(__file__).parent / "notes").read_text().count("\\n") == 12
"""
FAILS = """
def test_fails():
    assert 1 == 2
"""
DIES = """
import os

def test_dies():
    os._exit(0)
"""
DIES_ALONE = """
import os
import pytest

@pytest.mark.alone
def test_dies():
    os._exit(0)
"""


def run(folder: Path, **files: str) -> tuple[int, str, list[str]]:
    """Exit code, last line, and all lines of a run of such files: two processes, then those alone."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = alone\n    in_systemd\n")
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_all", "-c", str(folder / "pytest.ini"), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PHALANX_TEST_JOBS": "2"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    lines = done.stdout.splitlines()
    return done.returncode, lines[-1], lines


def test_each_test_runs_once_a_file_in_one_process_and_those_that_measure_time_at_the_end(
    tmp_path: Path,
) -> None:
    """Four files by two processes; the last line adds all up, as pytest's own would."""
    code, last, lines = run(tmp_path, a=GOOD, b=GOOD, c=GOOD, d=GOOD, alone=ALONE)
    assert code == 0, lines
    assert last.strip("= ").startswith("13 passed in ")
    notes = (tmp_path / "notes").read_text().splitlines()
    assert len(notes) == 12
    assert len(set(notes)) == 4
    assert all(line.partition("| ")[0] in ("1", "2", "alone") for line in lines[:-2] if line)


@pytest.mark.parametrize(
    ("bad", "told", "said"),
    [
        (FAILS, "1 failed, 13 passed in ", "FAILED "),
        ("import nothing_of_that_name", " error", "FAILED "),
        (DIES, "error, ", "NOT RUN "),
        (DIES_ALONE, "error, 12 passed in ", "pytest alone did not come to its end"),
    ],
    ids=["fails", "cannot-be-collected", "dies", "dies-alone"],
)
def test_whatever_goes_wrong_fails_the_whole(tmp_path: Path, bad: str, told: str, said: str) -> None:
    """A test that fails, a file that cannot be collected, a process that ends as if all were well."""
    code, last, lines = run(tmp_path, a=GOOD, b=GOOD, c=GOOD, d=GOOD, alone=ALONE, bad=bad)
    assert code == 1
    assert told in last
    assert any(line.startswith(said) for line in lines), lines


def test_nothing_that_ran_is_no_success(tmp_path: Path) -> None:
    """A selection that matches nothing."""
    code, last, _ = run(tmp_path)
    assert (code, "no tests ran" in last) == (1, True)
