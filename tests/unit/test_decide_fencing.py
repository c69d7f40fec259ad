"""Whom to fence before a takeover."""

from __future__ import annotations

import pytest

from phalanx.decide.fencing import needless, to_be_fenced
from phalanx.types import FenceNote, LeaderRecord, SessionId

N1, N1_LATER, N2, ME = SessionId("n1", "a"), SessionId("n1", "b"), SessionId("n2", "c"), SessionId("n3", "d")


def silent(session: SessionId) -> bool:
    """Nobody ended the session himself."""
    return False


def test_silent_leader_is_fenced_and_one_that_ended_itself_is_not() -> None:
    """Its own keeper has ended all that hung on it."""
    assert to_be_fenced(ME, LeaderRecord(5, N1), silent, fences=True) == (N1,)
    assert to_be_fenced(ME, LeaderRecord(5, N1), lambda session: session == N1, fences=True) == ()
    assert to_be_fenced(ME, LeaderRecord(5), silent, fences=True) == ()
    assert to_be_fenced(ME, LeaderRecord(5, ME), silent, fences=True) == ()


@pytest.mark.parametrize("fences", [True, False])
def test_what_others_still_had_to_fence_is_passed_on(fences: bool) -> None:
    """Also by a node that can't do it, and by a leader that has given the key back."""
    assert to_be_fenced(ME, LeaderRecord(5, unfenced=(N1, N2)), silent, fences=fences) == (N1, N2)
    assert to_be_fenced(ME, LeaderRecord(5, ME, unfenced=(N1,)), silent, fences=fences) == (N1,)


def test_of_a_node_only_its_latest_session_is_fenced() -> None:
    """Which is on the same host."""
    assert to_be_fenced(ME, LeaderRecord(5, N1_LATER, unfenced=(N1, N2)), silent, fences=True) == (
        N1_LATER,
        N2,
    )


def test_without_a_command_here_only_a_leader_that_declares_one_is_noted() -> None:
    """On a platform that fences nobody there is nothing to note."""
    assert to_be_fenced(ME, LeaderRecord(5, N1), silent, fences=False) == ()
    assert to_be_fenced(ME, LeaderRecord(5, N1, fences=True), silent, fences=False) == (N1,)
    assert to_be_fenced(ME, LeaderRecord(5, N1, unfenced=(N2,)), silent, fences=False) == (N2,)


def test_why_a_session_needs_no_fencing() -> None:
    """It was of this node; its node lives again; somebody has done it or vouches for it."""
    off, of_another = FenceNote(N1, "you@there", 1.0), FenceNote(N1_LATER, "you@there", 1.0)
    assert needless(N1, "n3", N1, (None, None)) == ""
    assert needless(N1, "n3", None, (of_another, None)) == ""
    assert "this very node" in needless(N1, "n1", N1, ())
    assert "has begun session b since" in needless(N1, "n3", N1_LATER, ())
    assert needless(N1, "n3", N1, (None, off)) == "it is off, by you@there"
