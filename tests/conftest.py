"""For all tests: Hypothesis takes no time; what needs a systemd runs where there is one (in_systemd.py)."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine, and of the tests beside it.
settings.register_profile("phalanx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("phalanx")


def pytest_configure(config: pytest.Config) -> None:
    """Inside of the container, tell of all that happens."""
    if os.environ.get("PHALANX_IN_SYSTEMD"):
        from tests import in_systemd

        config.pluginmanager.register(in_systemd.Reporter(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Outside, the first of them stands for all: each has its limit inside."""
    for item in items:
        if item.get_closest_marker("in_systemd") is not None and not os.environ.get("PHALANX_IN_SYSTEMD"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Outside, do not run what has run inside."""
    if item.get_closest_marker("in_systemd") is None:
        return None
    from tests import in_systemd

    return in_systemd.runs_elsewhere(item, nextitem)
