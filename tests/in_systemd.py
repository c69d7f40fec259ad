"""Runs tests that are marked ``in_systemd`` where a systemd is process 1: in a container, a file in one go.

Nothing of that is seen by the tests, which run inside as anywhere. The reports come back, and each test has
its own here. The container needs what ``phalanx.testing.dockerd`` needs; what is missing is an error, not a
skip.
"""

from __future__ import annotations

import compileall
import json
import os
import tempfile
from pathlib import Path

import pytest

from phalanx.testing.dockerd import DockerDaemon
from phalanx.testing.systemd_host import SystemdHost

INSIDE = os.environ.get("PHALANX_IN_SYSTEMD", "")
"""Inside: the file that the reports go to."""
ROOT = Path(__file__).resolve().parents[1]
RUN_SECONDS = 1200.0
"""For all of them: some 1.5 s each on a quiet machine."""

_reports_of = pytest.StashKey["dict[Path, dict[str, list[pytest.TestReport]]]"]()


def runs_elsewhere(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """For ``pytest_runtest_protocol``: reports a test that is to run in the container, and has run there."""
    if INSIDE or item.get_closest_marker("in_systemd") is None:
        return None
    session = item.session
    # Another process may have the other files.
    of_files = session.stash.setdefault(_reports_of, {})
    if item.path not in of_files:
        of_file = [one for one in session.items if one.path == item.path]
        of_files[item.path] = _run(
            [one for one in of_file if one.get_closest_marker("in_systemd") is not None]
        )
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in of_files[item.path][item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # As after any test: what the next one does not share is torn down.
    session._setupstate.teardown_exact(nextitem)
    return True


class Reporter:
    """Inside: a plugin that hands the reports on."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        with open(INSIDE, "a") as file:
            hook = self._config.hook.pytest_report_to_serializable
            file.write(json.dumps(hook(config=self._config, report=report)) + "\n")


def _run(items: list[pytest.Item]) -> dict[str, list[pytest.TestReport]]:
    """What became of each, by node id."""
    # Its source is mounted read-only: what is not compiled would be compiled at each start of a process.
    compileall.compile_dir(ROOT / "src", quiet=2)
    config, found = items[0].config, {item.nodeid: list[pytest.TestReport]() for item in items}
    with DockerDaemon() as dockerd, tempfile.TemporaryDirectory(prefix="phalanx-in-systemd-") as folder:
        reports = Path(folder) / "reports"
        host = SystemdHost(dockerd, "in-systemd", ROOT, f"--volume={folder}:{folder}")
        done = host.python(
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", *found),
            timeout=RUN_SECONDS,
            env={"PHALANX_IN_SYSTEMD": str(reports)},
        )
        for line in reports.read_text().splitlines() if reports.exists() else ():
            one = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
            if isinstance(one.longrepr, list):  # JSON has no tuples: where and why it was skipped
                one.longrepr = tuple(one.longrepr)
            found[one.nodeid].append(one)
    output = (done.stdout + done.stderr).decode(errors="replace")[-4000:]
    for item in items:
        if not found[item.nodeid] or found[item.nodeid][-1].when != "teardown":
            found[item.nodeid].append(_lost(item, output))
    return found


def _lost(item: pytest.Item, output: str) -> pytest.TestReport:
    text = f"the container did not report its end:\n{output}"
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")
