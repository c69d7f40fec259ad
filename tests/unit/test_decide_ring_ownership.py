"""Which partitions a node takes, acts for and gives back."""

from __future__ import annotations

import pytest

from phalanx.decide.ring_ownership import Action, Begin, End, Ownership, Read, Write
from phalanx.types import SessionId

ME, OLD, OTHER = SessionId("me", "2"), SessionId("me", "1"), SessionId("z", "1")


class Ring:
    """One partition or some, with what this node knows."""

    def __init__(self, *planned: str) -> None:
        self.over: set[SessionId] = set()
        self.own = Ownership(ME, len(planned), self.over.__contains__)
        self.own.on_plan(planned)

    def step(self, *, valid: bool = True, may_begin: bool = True) -> list[Action]:
        """What is to be done."""
        return self.own.step(valid=valid, may_begin=valid and may_begin)

    @classmethod
    def owning(cls) -> Ring:
        """Partition 0 is owned at epoch 4."""
        ring = cls("me")
        ring.step()
        ring.own.on_written(0, 4, take=True)
        assert ring.step() == [Begin(0, 4)]
        return ring


def test_planned_partitions_that_are_free_are_taken_at_their_revision() -> None:
    """Never written (0), released, or of a session that is over; not those of the living, or of others."""
    ring = Ring("me", "me", "me", "me", "z", "me")
    ring.own.on_record(1, 7, None)
    ring.own.on_record(2, 8, OLD)
    ring.own.on_record(3, 9, OTHER)
    ring.over.add(OLD)
    assert ring.step() == [Write(0, 0, True), Write(1, 7, True), Write(2, 8, True), Write(5, 0, True)]
    assert ring.step() == []
    ring.over.add(OTHER)
    ring.own.on_session_over(OTHER)
    assert ring.step() == [Write(3, 9, True)]


def test_g6_partition_of_a_living_session_is_not_taken_whatever_the_plan_says() -> None:
    """Not even one of this very node's earlier life: it may still run."""
    ring = Ring("me", "me")
    ring.own.on_record(0, 8, OTHER)
    ring.own.on_record(1, 9, OLD)
    assert ring.step() == []


def test_own_write_begins_whether_its_reply_or_the_watch_comes_first() -> None:
    """Once; the later of the two changes nothing."""
    ring = Ring("me", "me")
    assert ring.step() == [Write(0, 0, True), Write(1, 0, True)]
    ring.own.on_written(0, 3, take=True)
    ring.own.on_record(1, 4, ME)
    assert ring.step() == [Begin(0, 3), Begin(1, 4)]
    ring.own.on_record(0, 3, ME)
    ring.own.on_written(1, 4, take=True)
    assert ring.step() == []
    assert (ring.own.epoch(0), ring.own.epoch(1), ring.own.held) == (3, 4, [0, 1])


def test_g6_release_then_own() -> None:
    """What the plan gives to another is ended first; only then the key is given back, under its epoch."""
    ring = Ring.owning()
    ring.own.on_plan(["z"])
    assert ring.step() == [End(0, 4, "the plan gives it to z", hard=False)]
    assert ring.own.epoch(0) == 0
    assert ring.step() == []
    ring.own.on_ended(0)
    assert ring.step() == [Write(0, 4, False)]
    assert not ring.own.is_clear
    ring.own.on_written(0, 5, take=False)
    assert ring.step() == []
    assert ring.own.is_clear


def test_g2_epoch_that_has_ended_never_begins_again() -> None:
    """The plan comes back before the release is written: the key is taken anew, under a new epoch."""
    ring = Ring.owning()
    ring.own.on_plan(["z"])
    ring.step()
    ring.own.on_plan(["me"])
    assert ring.step() == []
    ring.own.on_ended(0)
    assert ring.step() == [Write(0, 4, True)]
    ring.own.on_written(0, 6, take=True)
    assert ring.step() == [Begin(0, 6)]


def test_g6_epoch_whose_release_may_be_under_way_does_not_begin() -> None:
    """A release that is sent without having begun counts as an end, whatever report comes meanwhile."""
    ring = Ring("me")
    assert ring.step() == [Write(0, 0, True)]
    ring.own.on_plan(["z"])
    ring.own.on_record(0, 4, ME)  # its own write, by the watch
    assert ring.step() == [Write(0, 4, False)]
    ring.own.on_written(0, 4, take=True)  # the late reply to the first one
    ring.own.on_plan(["me"])
    assert ring.step() == [Write(0, 4, True)]


def test_refused_or_unanswered_write_is_read_back() -> None:
    """What it came to is asked; the answer decides, and no answer means to ask again."""
    ring = Ring("me")
    ring.step()
    ring.own.on_not_written(0)
    assert ring.step() == [Read(0)]
    assert ring.step() == []
    ring.own.on_not_read(0)
    assert ring.step() == [Read(0)]
    ring.own.on_read(0, 0, None)  # a spurious refusal
    assert ring.step() == [Write(0, 0, True)]
    ring.own.on_not_written(0)
    ring.step()
    ring.own.on_read(0, 9, ME)  # its reply was lost
    assert ring.step() == [Begin(0, 9)]


@pytest.mark.parametrize(
    ("valid", "reason", "hard"),
    [(True, "the session runs out", False), (False, "the session is no longer valid", True)],
)
def test_partitions_end_before_their_session_does(valid: bool, reason: str, hard: bool) -> None:
    """Gracefully while there is time, at once when there is none; and nothing begins."""
    ring = Ring.owning()
    assert ring.step(valid=valid, may_begin=False) == [End(0, 4, reason, hard)]
    ring.own.on_ended(0)
    assert ring.step(valid=valid, may_begin=False) == ([Write(0, 4, False)] if valid else [])


def test_graceful_end_becomes_a_hard_one() -> None:
    """The session is lost while the hook takes its time: told once more, and only once."""
    ring = Ring.owning()
    assert ring.step(may_begin=False) == [End(0, 4, "the session runs out", hard=False)]
    assert ring.step(valid=False) == [End(0, 4, "the session is no longer valid", hard=True)]
    assert ring.step(valid=False, may_begin=False) == []


def test_deposed_owner_ends_at_once_and_gives_nothing_back() -> None:
    """Its key has gone on without it: whoever holds it now is not disturbed."""
    ring = Ring.owning()
    ring.own.on_record(0, 6, OTHER)
    assert ring.step() == [End(0, 4, "its key names z at epoch 6", hard=True)]
    ring.own.on_ended(0)
    ring.own.on_plan(["z"])
    assert ring.step() == []


def test_node_that_leaves_gives_everything_back_and_takes_nothing() -> None:
    """Also what the plan still gives to it, and a key that it has only just got."""
    ring = Ring("me", "me", "me")
    ring.step()
    ring.own.on_written(0, 4, take=True)
    ring.step()
    ring.own.leave()
    ring.own.on_written(1, 5, take=True)
    assert ring.step() == [End(0, 4, "the node is stopping", hard=False), Write(1, 5, False)]
    ring.own.on_not_written(2)
    assert ring.step() == [Read(2)]
    ring.own.on_read(2, 0, None)
    ring.own.on_written(1, 6, take=False)
    ring.own.on_ended(0)
    assert ring.step() == [Write(0, 4, False)]
    assert not ring.own.is_clear
    ring.own.on_written(0, 7, take=False)
    assert ring.own.is_clear


def test_partition_that_has_failed_is_left_alone_for_a_while() -> None:
    """It is ended and given back; later it is taken again if the plan still says so."""
    ring = Ring.owning()
    ring.own.set_aside(0, True)
    assert ring.step() == [End(0, 4, "it has failed here", hard=False)]
    ring.own.on_ended(0)
    assert ring.step() == [Write(0, 4, False)]
    ring.own.on_written(0, 5, take=False)
    assert ring.step() == []
    ring.own.set_aside(0, False)
    assert ring.step() == [Write(0, 5, True)]


def test_g2_servers_that_have_lost_writes_count_no_epoch_twice() -> None:
    """After a reconnection the key is not as it was written: the owner ends, to begin past its old epoch."""
    ring = Ring.owning()
    ring.own.on_reconnected()
    assert ring.step() == [Read(0)]
    ring.own.on_read(0, 2, None)
    assert ring.step() == [End(0, 4, "its key names nobody at epoch 2", hard=True)]
    ring.own.on_ended(0)
    assert ring.step() == [Write(0, 2, True)]
    ring.own.on_written(0, 3, take=True)
    assert ring.step() == [Write(0, 3, True)]
    ring.own.on_written(0, 4, take=True)
    assert ring.step() == [Write(0, 4, True)]
    ring.own.on_written(0, 5, take=True)
    assert ring.step() == [Begin(0, 5)]


def test_reconnection_that_finds_all_as_it_was_changes_nothing() -> None:
    """The owner goes on."""
    ring = Ring.owning()
    ring.own.on_reconnected()
    assert ring.step() == [Read(0)]
    ring.own.on_read(0, 4, ME)
    assert ring.step() == []
    assert ring.own.epoch(0) == 4


def test_step_of_a_large_ring_costs_what_changes() -> None:
    """16,384 partitions: the first step looks at all, one record at one of them."""
    ring = Ring(*["me"] * 16_384)
    assert len(ring.step()) == 16_384
    ring.own.on_written(77, 1, take=True)
    assert ring.step() == [Begin(77, 1)]
    assert ring.own.held == [77]


def test_g6_session_of_an_earlier_life_goes_on_with_no_epoch_that_it_had() -> None:
    """Taken up in a pause: what ran under those epochs has ended with that process."""
    own = Ownership(ME, 1, lambda session: False, taken_up=True)
    own.on_plan(("me",))
    own.on_record(0, 4, ME)
    assert own.step(valid=True, may_begin=True) == [Write(0, 4, True)]
    own.on_record(0, 9, ME)  # the watch is faster than the answer
    own.on_written(0, 9, take=True)
    assert own.step(valid=True, may_begin=True) == [Begin(0, 9)]


def test_g6_the_same_is_so_of_what_is_read_after_a_lost_answer() -> None:
    """It may be this life's own write or an earlier one's: it is taken anew."""
    own = Ownership(ME, 1, lambda session: False, taken_up=True)
    own.on_plan(("me",))
    assert own.step(valid=True, may_begin=True) == [Write(0, 0, True)]
    own.on_not_written(0)
    assert own.step(valid=True, may_begin=True) == [Read(0)]
    own.on_read(0, 5, ME)
    assert own.step(valid=True, may_begin=True) == [Write(0, 5, True)]


def test_node_that_does_not_leave_after_all_takes_again() -> None:
    """It was to end because of another app, which has ended in the meantime."""
    ring = Ring.owning()
    ring.own.leave()
    assert ring.step() == [End(0, 4, "the node is stopping", False)]
    ring.own.on_ended(0)
    assert ring.step() == [Write(0, 4, False)]
    ring.own.on_written(0, 6, take=False)
    assert ring.step() == []
    ring.own.leave(False)
    assert ring.step() == [Write(0, 6, True)]
