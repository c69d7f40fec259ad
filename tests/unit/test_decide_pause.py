"""What a pause changes."""

from __future__ import annotations

import pytest

from phalanx.decide.pause import WHOLE_PLATFORM, Cause, ends_section, kept, pause_of
from phalanx.types import Pause, Resource

OWN, ALL = Pause("me@here", 1.0), Pause("you@there", 2.0, "a move")


def test_own_pause_goes_before_that_of_the_platform() -> None:
    """An app is paused by its name or with all others."""
    assert pause_of("wiki", {}) is None
    assert pause_of("wiki", {"shop": OWN}) is None
    assert pause_of("wiki", {WHOLE_PLATFORM: ALL}) is ALL
    assert pause_of("wiki", {WHOLE_PLATFORM: ALL, "wiki": OWN}) is OWN


@pytest.mark.parametrize("cause", list(Cause))
def test_without_a_pause_everything_ends_a_section(cause: Cause) -> None:
    """As it has always been."""
    assert ends_section(cause, paused=False)


@pytest.mark.parametrize(
    ("cause", "ends"),
    [
        (Cause.ILL, False),
        (Cause.FAILED, False),
        (Cause.DATABASE_LOST, True),
        (Cause.NODE_STOPS, True),
        (Cause.SESSION_ENDS, True),
    ],
)
def test_in_a_pause_only_what_safety_needs_ends_a_section(cause: Cause, ends: bool) -> None:
    """The session's end above all: G1 goes before a pause."""
    assert ends_section(cause, paused=True) is ends


def test_kept_is_all_of_an_app_or_nothing() -> None:
    """What cannot outlive the node takes the rest of its app with it; other apps are not touched."""
    unit = Resource("unit", "u", "wiki", 1, adoptable=True)
    hooks = Resource("section", "h", "shop", 2)
    container = Resource("container", "c", "shop", 2, adoptable=True)
    unpaused = Resource("unit", "v", "blog", 3, adoptable=True)
    assert kept([unit, hooks, container, unpaused], ("wiki", "shop")) == [unit]
    assert kept([unit], ()) == []
