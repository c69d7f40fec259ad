"""For all tests: those that need a systemd run where there is one (tests/in_systemd.py)."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Inside of the container, tell of all that happens."""
    if os.environ.get("PHALANX_IN_SYSTEMD"):
        from tests import in_systemd

        config.pluginmanager.register(in_systemd.Reporter(config))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Outside, do not run what has run inside."""
    if item.get_closest_marker("in_systemd") is None:
        return None
    from tests import in_systemd

    return in_systemd.runs_elsewhere(item, nextitem)
