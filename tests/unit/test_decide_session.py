"""The session register's rules, one by one; the simulator tries them together."""

from __future__ import annotations

import pytest

from phalanx.decide.session import Holder, Observer, SessionBody, StreamList, Tombstone
from phalanx.decide.timing import Timing
from phalanx.types import SessionId

TIMING = Timing.of(2.0)  # hold 1.9, observe 2.1, gap 0.6
THREE = StreamList(1, ("a", "b", "c"))
ME, OTHER = SessionId("n1", "x"), SessionId("n2", "y")
ALIVE, DEAD = SessionBody(1), SessionBody(1, tombstone=True)


def holder(streams: StreamList = THREE) -> Holder:
    """A holder whose first renewal, sent at 0, every stream has taken as revision 1."""
    held = Holder(ME, streams, TIMING)
    for renewal in held.renewals(0.0):
        held.on_ack(renewal.stream, 0.0, 1)
    return held


def sent_to(held: Holder, now: float) -> dict[str, int]:
    """Stream → expected revision of what is due."""
    return {renewal.stream: renewal.revision for renewal in held.renewals(now)}


def observer(streams: StreamList = THREE) -> Observer:
    """An observer that has heard both sessions in every stream at 0."""
    seen = Observer(streams, TIMING, 0.0)
    for stream in streams.all_streams:
        seen.on_catch_up(stream, {ME: (1, ALIVE), OTHER: (2, ALIVE)}, 0.0, interrupted=True, asked_at=0.0)
    return seen


def hear(seen: Observer, since: float, until: float, streams: str = "abc", session: SessionId = ME) -> None:
    """*session* renews every 0.5 s."""
    for step in range(int(since * 2), int(until * 2) + 1):
        for stream in streams:
            seen.on_record(stream, session, 10 + step, ALIVE, step / 2)


# --- lists


def test_a_majority_is_more_than_half_of_every_list() -> None:
    """While a list is replaced, both lists must agree."""
    joint = THREE.joint_with(("a", "d", "e"))
    assert THREE.has_majority("ab")
    assert not THREE.has_majority("aa")
    assert not joint.has_majority("abc")
    assert joint.has_majority("abd")
    assert joint.settled().has_majority("de")
    assert not StreamList(1, ("a", "b")).has_majority("a")


def test_the_majority_newest_time_is_the_second_newest_of_three() -> None:
    """One fresh stream alone proves nothing, one lost stream harms nothing."""
    assert THREE.majority_newest({"a": 3.0, "b": 2.0, "c": 1.0}) == 2.0
    assert THREE.majority_newest({"a": 3.0}) == float("-inf")
    assert THREE.joint_with(("c", "d", "e")).majority_newest({"a": 9.0, "b": 8.0, "c": 1.0, "d": 0.5}) == 0.5


def test_a_list_is_replaced_in_two_steps_only() -> None:
    """Neither step can be skipped or doubled."""
    with pytest.raises(ValueError, match="under way already"):
        THREE.joint_with(("d",)).joint_with(("e",))
    with pytest.raises(ValueError, match="no replacement"):
        THREE.settled()


# --- the holder


def test_a_renewal_counts_from_its_sending() -> None:
    """However late its answer comes."""
    held = Holder(ME, THREE, TIMING)
    held.renewals(5.0)
    held.on_ack("a", 5.0, 1)
    assert not held.is_valid(5.1)
    held.on_ack("b", 5.0, 1)
    assert held.valid_until == pytest.approx(5.0 + TIMING.hold)


def test_an_expired_session_is_never_renewed_again() -> None:
    """Not even by an answer that was still under way."""
    held = holder()
    assert sent_to(held, 1.8) == {"a": 1, "b": 1, "c": 1}
    assert not held.is_valid(1.9)
    for stream in "abc":
        held.on_ack(stream, 1.8, 2)
    assert held.is_expired
    assert not held.is_valid(1.91)
    assert sent_to(held, 1.95) == {}


def test_one_request_per_stream_is_under_way_and_a_refusal_is_read_back() -> None:
    """A refusal may be our own write whose answer was lost: the next one expects what is there."""
    held = holder()
    assert sent_to(held, 0.2) == {"a": 1, "b": 1, "c": 1}
    assert sent_to(held, 0.4) == {}
    held.on_refused("a")
    held.on_unanswered("b")
    assert held.reads() == ["a"]
    assert sent_to(held, 0.6) == {"b": 1}
    held.on_read("a", 7, ALIVE, 0.7)
    assert sent_to(held, 0.8) == {"a": 7}
    assert held.valid_until == pytest.approx(TIMING.hold), "reading acknowledges nothing"


def test_a_tombstone_is_never_overwritten_and_two_of_three_end_it() -> None:
    """The holder leaves a buried stream alone, and is over with the second."""
    held = holder()
    held.on_read("a", 5, DEAD, 0.1)
    assert held.is_valid(0.2)
    assert sent_to(held, 0.2) == {"b": 1, "c": 1}
    assert held.revisions() == {"b": 1, "c": 1}
    held.on_read("b", 5, DEAD, 0.3)
    assert held.is_ended
    assert not held.is_valid(0.3)


def test_a_lost_key_is_put_again_only_while_the_others_take_renewals() -> None:
    """A machine brought back from a snapshot has nobody who takes its renewals."""
    held = holder()
    held.on_refused("a")
    held.on_read("a", 0, None, 0.5)
    assert sent_to(held, 0.5) == {"b": 1, "c": 1}
    held.on_ack("b", 0.5, 2)
    assert sent_to(held, 0.6) == {"b": 2}
    held.on_ack("c", 0.5, 2)
    assert sent_to(held, 0.6) == {"a": 0, "c": 2}


def test_a_sequence_that_went_back_is_followed() -> None:
    """A server without its last writes gives smaller revisions; they are good."""
    held = holder()
    held.on_ack("a", 0.2, 9)
    held.on_read("a", 4, ALIVE, 0.3)
    assert sent_to(held, 0.4)["a"] == 4
    held.on_ack("a", 0.4, 5)
    assert held.revisions()["a"] == 5


def test_a_joint_list_of_unknown_streams_does_not_end_a_session() -> None:
    """What the old list acknowledged stays good until it runs out, and no longer."""
    held = holder()
    held.on_streams(THREE.joint_with(("c", "d", "e")))
    assert held.valid_until == pytest.approx(TIMING.hold)
    assert held.is_valid(1.0)
    held.renewals(1.0)
    for stream in "abc":
        held.on_ack(stream, 1.0, 2)
    assert held.valid_until == pytest.approx(TIMING.hold), "the new list has no majority yet"
    held.on_ack("d", 1.0, 2)
    assert held.valid_until == pytest.approx(1.0 + TIMING.hold)
    held.on_streams(held.streams.settled())
    assert held.valid_until == pytest.approx(1.0 + TIMING.hold)


def test_g1_a_session_ended_under_the_old_list_does_not_begin_under_the_new_one() -> None:
    """Buried by a majority of the old list before it ever counted: ended, though all new ones take it."""
    held = Holder(ME, THREE, TIMING)
    held.renewals(0.0)
    for stream in ("a", "c"):
        held.on_refused(stream)
    joint = THREE.joint_with(("d", "b", "e"))
    held.on_streams(joint)
    for renewal in held.renewals(0.1):
        held.on_ack(renewal.stream, 0.1, 1)
    held.on_ack("b", 0.0, 1)
    held.on_read("a", 2, DEAD, 0.2)
    assert not held.is_ended
    held.on_read("c", 2, DEAD, 0.2)
    assert held.is_ended
    held.on_streams(joint.settled())
    assert held.is_ended
    assert not held.is_valid(0.3)


def test_g1_a_session_that_never_had_a_majority_does_not_begin_when_the_list_is_settled() -> None:
    """It may be buried in streams that it no longer looks at; one that has sent nothing yet may begin."""
    joint = THREE.joint_with(("d", "b", "e"))
    held = Holder(ME, joint, TIMING)
    held.renewals(0.0)
    for stream in ("b", "d", "e"):
        held.on_ack(stream, 0.0, 1)
    assert not held.is_valid(0.1)
    held.on_streams(joint.settled())
    assert not held.is_valid(0.1)
    fresh = Holder(ME, joint, TIMING)
    fresh.on_streams(joint.settled())
    for renewal in fresh.renewals(0.0):
        fresh.on_ack(renewal.stream, 0.0, 1)
    assert fresh.is_valid(0.1)


def test_an_older_list_is_ignored() -> None:
    """A list that comes late does not undo a newer one."""
    held = holder()
    held.on_streams(StreamList(1, ("x",)))
    assert held.streams == THREE


# --- the observer


def test_a_silent_session_is_buried_after_observe_where_it_is_stale() -> None:
    """Not a moment before, at the revision that was seen, and only because a majority is stale."""
    seen = observer()
    hear(seen, 0.0, 4.0, session=OTHER)
    assert seen.tombstones(2.05) == []
    assert seen.tombstones(4.0) == [Tombstone(s, ME, 1) for s in "abc"]
    assert seen.tombstones(4.0, except_for=ME) == []


def test_one_stale_stream_is_not_enough() -> None:
    """A holder that does not reach one server is alive."""
    seen = observer()
    hear(seen, 0.0, 4.0, "bc")
    hear(seen, 0.0, 4.0, session=OTHER)
    assert seen.tombstones(4.0) == []


def test_a_stream_that_was_silent_counts_from_its_resumption() -> None:
    """While nothing was heard, renewals may have been missed, and its server may have lost writes."""
    seen = observer()
    hear(seen, 3.0, 4.5, session=OTHER)
    assert seen.tombstones(4.5) == []
    hear(seen, 5.0, 5.5, session=OTHER)
    assert len(seen.tombstones(5.5)) == 3


def test_an_empty_catch_up_after_silence_is_a_resumption_too() -> None:
    """A server that lost everything must not make a session look long stale there."""
    seen = Observer(THREE, TIMING, 0.0)
    seen.note(ME, 0.0)
    for stream in "abc":
        seen.on_catch_up(stream, {}, 5.0, interrupted=False, asked_at=4.9)
    assert seen.tombstones(5.1) == []
    for stream in "abc":
        hear(seen, 5.5, 7.0, stream, session=OTHER)
    assert seen.tombstones(7.2) == [Tombstone(s, ME, 0) for s in "abc"]


def test_a_sequence_that_went_back_restarts_the_count() -> None:
    """Somebody's record with a smaller revision shows that the server lost its last writes."""
    seen = observer()
    hear(seen, 0.0, 2.0, session=OTHER)
    for stream in "abc":
        seen.on_record(stream, OTHER, 3, ALIVE, 2.1)
    assert seen.tombstones(2.2) == []


def test_the_same_revision_again_on_the_watch_is_a_renewal() -> None:
    """After a loss a number is used twice; taking the second for the first would end a live session."""
    seen = observer()
    hear(seen, 0.0, 1.0, session=OTHER)
    for stream in "abc":
        seen.on_record(stream, ME, 1, ALIVE, 1.5)
    hear(seen, 2.0, 3.5, session=OTHER)
    assert seen.tombstones(3.5) == []
    assert len(seen.tombstones(3.7)) == 3


def test_reading_an_old_renewal_again_makes_it_no_younger() -> None:
    """Regular catch-ups must not keep a dead session alive."""
    seen = observer()
    hear(seen, 0.0, 2.0, session=OTHER)
    for stream in "abc":
        seen.on_catch_up(stream, {ME: (1, ALIVE)}, 2.0, interrupted=False, asked_at=1.9)
        seen.on_record(stream, OTHER, 15, ALIVE, 2.2)
    assert len(seen.tombstones(2.3)) >= 3


def test_a_catch_up_that_crossed_with_the_watch_does_not_go_back() -> None:
    """Its answer may be older than what the watch brought meanwhile."""
    seen = observer()
    seen.on_record("a", ME, 5, ALIVE, 1.0)
    seen.on_catch_up("a", {ME: (4, ALIVE), OTHER: (2, ALIVE)}, 1.1, interrupted=False, asked_at=0.9)
    hear(seen, 1.0, 3.5, session=OTHER)
    assert Tombstone("a", ME, 5) in seen.tombstones(3.5)


def test_two_tombstones_end_a_session_for_good() -> None:
    """It stays over when a server loses its tombstone, and is told once."""
    seen = observer()
    assert seen.on_record("a", ME, 20, DEAD, 1.0) == []
    assert not seen.is_over(ME)
    assert seen.on_record("b", ME, 20, DEAD, 1.0) == [ME]
    assert seen.on_record("c", ME, 20, DEAD, 1.0) == []
    seen.on_record("a", ME, 3, ALIVE, 1.2)
    seen.on_catch_up("b", {}, 1.3, interrupted=True, asked_at=1.2)
    assert seen.is_over(ME)
    assert ME not in seen.live()
    seen.forget(OTHER)
    seen.forget(ME)
    assert seen.known() == [OTHER]


def test_a_tombstone_counts_though_its_server_lost_it() -> None:
    """It was written, so the session had run out: the second one ends it."""
    seen = observer()
    seen.on_record("a", ME, 20, DEAD, 1.0)
    seen.on_record("a", ME, 3, ALIVE, 1.2)
    assert seen.on_record("b", ME, 20, DEAD, 1.3) == [ME]


def test_a_session_in_one_stream_ends_with_one_tombstone() -> None:
    """On a single server one stream is the majority."""
    seen = observer(StreamList(1, ("a",)))
    assert seen.on_record("a", ME, 3, DEAD, 1.0) == [ME]


def test_a_half_buried_session_is_finished_off_when_the_rest_is_stale() -> None:
    """Somebody began to end it: one stale stream and one tombstone are a majority."""
    seen = observer()
    seen.on_record("a", ME, 20, DEAD, 0.5)
    hear(seen, 0.0, 4.0, "c")
    hear(seen, 0.0, 4.0, session=OTHER)
    assert seen.tombstones(4.0) == [Tombstone("b", ME, 1)]


def test_a_new_list_is_used_once_it_was_heard_and_seen() -> None:
    """The settling node knows under which generation a majority of each list was renewed."""
    seen = observer()
    joint = THREE.joint_with(("b", "c", "d"))
    seen.on_streams(joint, 1.0)
    assert seen.seen_generation(ME) == -1 or seen.seen_generation(ME) < 2
    for stream in "bc":
        seen.on_record(stream, ME, 30, SessionBody(2), 1.1)
    assert seen.seen_generation(ME) == 2
    seen.on_streams(joint.settled(), 1.2)
    assert seen.on_record("a", ME, 40, DEAD, 1.3) == []
    assert seen.seen_generation(SessionId("n9", "z")) == -1


def test_the_next_check_is_when_the_first_key_goes_stale() -> None:
    """So a node sleeps until then, and a TTL at most where nobody is known."""
    assert observer().next_check(0.5) == pytest.approx(TIMING.observe)
    assert Observer(THREE, TIMING, 0.0).next_check(1.0) == pytest.approx(3.0)


def test_a_session_ended_itself_if_any_of_its_tombstones_is_its_own() -> None:
    """Its keeper reached one stream and observers buried the rest; observers alone prove nothing."""
    mine = SessionBody(1, tombstone=True, released=True)
    for bodies, expected in (((mine, DEAD, DEAD), True), ((DEAD, DEAD, DEAD), False)):
        seen = observer()
        for stream, body in zip("abc", bodies, strict=True):
            seen.on_record(stream, ME, 5, body, 1.0)
        assert seen.is_over(ME)
        assert seen.ended_itself(ME) is expected
    assert not observer().ended_itself(ME)


def test_a_renewal_that_says_released_proves_nothing() -> None:
    """Only a tombstone does; and what it has proved stays so, whatever the server loses."""
    seen = observer()
    seen.on_record("a", ME, 5, SessionBody(1, released=True), 1.0)
    assert not seen.ended_itself(ME)
    seen.on_record("a", ME, 6, SessionBody(1, tombstone=True, released=True), 1.1)
    seen.on_record("a", ME, 7, DEAD, 1.2)
    assert seen.ended_itself(ME)
