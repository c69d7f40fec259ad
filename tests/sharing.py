"""A pytest plugin: several pytest processes share the tests. ``tests/run_all.py`` starts them.

Each collects all of them, and takes one file after another that no other process has taken. So a file's
fixtures are made once, as in one process, and none of the processes is idle while there are files left. Those
that are to run where a systemd is process 1 all belong together: one container runs them.

Tests marked ``alone`` measure time: they run in a process of their own, with nothing beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER_VARIABLE = "PHALANX_TEST_SHARING"
"""The folder that the processes share: what is taken, and what came of it."""
NAME_VARIABLE = "PHALANX_TEST_SHARE"
"""The name of this process among them. ``alone``: it runs the tests marked so; the others run the rest."""
ALONE = "alone"


def pytest_configure(config: pytest.Config) -> None:
    """Share with those that the environment names."""
    config.pluginmanager.register(Sharing(Path(os.environ[FOLDER_VARIABLE]), os.environ[NAME_VARIABLE]))


class Sharing:
    """What one of the processes does."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._collected: list[str] = []
        self._ended: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave those away that are another's for sure."""
        wanted, others = list[pytest.Item](), list[pytest.Item]()
        for item in items:
            is_alone = item.get_closest_marker(ALONE) is not None
            (wanted if is_alone == (self._name == ALONE) else others).append(item)
        items[:] = wanted
        config.hook.pytest_deselected(items=others)
        self._collected = [item.nodeid for item in items]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """As pytest's own, of what this process takes."""
        if session.config.option.collectonly or session.testsfailed:
            return None
        for items in self._taken(session.items):
            # After the last test of a file it is not known which comes next: what is the session's stays.
            for item, following in zip(items, [*items[1:], session], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
        return True

    def _taken(self, items: list[pytest.Item]) -> Iterator[list[pytest.Item]]:
        groups: dict[str, list[pytest.Item]] = {}
        for item in items:
            in_systemd = item.get_closest_marker("in_systemd") is not None
            groups.setdefault("in_systemd" if in_systemd else item.nodeid.partition("::")[0], []).append(item)
        for name, group in groups.items():
            try:
                (self._folder / f"taken-{name.replace('/', '-')}").touch(exist_ok=False)
            except FileExistsError:
                continue
            yield group

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The last report of a test."""
        if report.when == "teardown":
            self._ended.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Tell who adds it all up."""
        found = {
            "collected": self._collected,
            "ended": self._ended,
            "counts": {kind: len(of) for kind, of in terminalreporter.stats.items()},
            "failed": [
                one.nodeid for kind in ("failed", "error") for one in terminalreporter.stats.get(kind, ())
            ],
        }
        (self._folder / f"found-{self._name}").write_text(json.dumps(found))
