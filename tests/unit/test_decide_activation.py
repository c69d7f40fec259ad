"""The order of becoming active and of standing down, and how failures delay the next try."""

from __future__ import annotations

from phalanx.decide.activation import STABLE_SECONDS, Failures, Step, Undo, steps, undoing
from phalanx.decide.backoff import Backoff

RETRY = Backoff(first=1.0, factor=2.0, longest=5.0)


def test_steps_are_those_that_the_app_has() -> None:
    """Registration is for code inside the node; what writes starts beside Litestream, after the guard."""
    program = (Step.BACKEND, Step.READY)
    assert steps(has_backend=True, has_hooks=True) == (Step.REGISTER, *program, Step.ON_ACTIVE)
    assert steps(has_backend=True, has_hooks=False) == program
    assert steps(has_backend=False, has_hooks=False) == ()
    database = (Step.SEAL, Step.PROMOTE, Step.CAPTURE)
    all_of_them = (Step.REGISTER, *database, *program, Step.ON_ACTIVE, Step.CAPTURED)
    assert steps(has_backend=True, has_hooks=True, has_database=True) == all_of_them


def test_capture_stops_after_the_backend_that_writes() -> None:
    """Also when the activation was interrupted before or in the middle of a database's steps."""
    begun = (Step.REGISTER, Step.SEAL, Step.PROMOTE, Step.CAPTURE, Step.BACKEND)
    assert undoing(begun, graceful=True) == (Undo.STOP_BACKEND, Undo.STOP_CAPTURE, Undo.UNREGISTER)
    assert undoing(begun[:2], graceful=False) == (Undo.STOP_CAPTURE, Undo.UNREGISTER)


def test_standing_down_undoes_what_was_begun_backwards() -> None:
    """on_passive only at a graceful end; the section stays registered until all else has ended."""
    begun = (Step.REGISTER, Step.BACKEND, Step.ON_ACTIVE)
    hard = (Undo.END_ON_ACTIVE, Undo.STOP_BACKEND, Undo.UNREGISTER)
    assert undoing(begun, graceful=False) == hard
    assert undoing(begun, graceful=True) == (Undo.END_ON_ACTIVE, Undo.ON_PASSIVE, *hard[1:])
    assert undoing((Step.REGISTER, Step.BACKEND), graceful=True) == hard[1:]
    assert undoing((), graceful=True) == ()


def test_each_failure_in_a_row_delays_the_next_try_longer() -> None:
    """1 s, 2 s, 4 s, and never more than the longest."""
    failures, delays = Failures(), list[float]()
    for _ in range(4):
        failures = failures.failed(100.0, "no", RETRY)
        delays.append(failures.not_before - 100.0)
    assert delays == [1.0, 2.0, 4.0, 5.0]


def test_a_stable_section_wipes_the_count_but_not_the_wait() -> None:
    """A node that was active for long and was just found ill, or stepped down, still waits for its time."""
    failures = Failures().failed(100.0, "ill", RETRY).failed(100.0, "ill", RETRY)
    assert failures.was_active(STABLE_SECONDS - 1) == failures
    stable = failures.was_active(STABLE_SECONDS)
    assert stable.count == 0
    assert stable.not_before == failures.not_before == 102.0
