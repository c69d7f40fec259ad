"""The sentences of ``phalanx why`` over many states."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from phalanx.decide.why import Explanation, Facts, NodeFacts, explain
from phalanx.types import (
    AppStatus,
    DatabaseState,
    Health,
    Pause,
    PlannedSwitchover,
    ProgramState,
    ProgramStatus,
    Role,
    Standing,
    Succession,
)

NOW = 1000.0
TOOK = Succession(7, NOW - 60, "n1", 5, "session-over", "expired", False, "", 0.012)


def status(role: Role, standing: Standing | None = None, **changes: Any) -> AppStatus:
    """The app on one node, as the leader n2 of epoch 7 sees it."""
    known: dict[str, Any] = {"epoch": 7, "leader": "n2", "health": Health.HEALTHY, "since": NOW - 60}
    return AppStatus("wiki", role, standing=standing or Standing(eligible=True), **{**known, **changes})


def active(**changes: Any) -> AppStatus:
    """The leader, active and well."""
    standing = Standing(eligible=True, healthy_since=NOW - 59, succession=TOOK, ttl_seconds=2.0)
    return status(Role.ACTIVE, standing, **changes)


def told(*nodes: AppStatus | None, live: bool = True, **changes: Any) -> Explanation:
    """n1, n2, … in this order; None: it does not answer."""
    found = tuple(
        NodeFacts(f"n{number}", live or one is not None, one) for number, one in enumerate(nodes, 1)
    )
    return explain(Facts("wiki", NOW, found, **changes))


def text(found: Explanation) -> str:
    """All of it."""
    parts = [*found.here, *(f"not {n.node}: {n.because}" for n in found.not_there)]
    return "\n".join([*parts, *(f"waits: {w}" for w in found.waits_for), *found.hints])


STANDBY = status(Role.STANDBY)
VACANT = {"epoch": 0, "leader": None}


def test_an_active_node_is_explained_by_how_it_came_to_lead() -> None:
    """Who led before, how that ended, and how it is now; the others are ready."""
    found = told(STANDBY, active())
    assert (found.active, found.leader, found.epoch) == ("n2", "n2", 7)
    assert found.here[0] == "n2 is active for wiki (epoch 7), for 60.0 s"
    assert "from n1 (epoch 5), whose session had ended: expired; the key was free for 12 ms" in found.here[1]
    assert found.here[-1] == "its checks are healthy"
    assert found.not_there[0].because == "it is ready, but n2 leads, and nothing is taken away from it"
    assert found.waits_for == ()
    assert found.hints == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"previous": "", "how": ""}, "nobody whom it knew of had led before"),
        ({"previous": "n2"}, "from an earlier life of it"),
        ({"how": "released", "reason": "SIGTERM"}, "n1 had given the key back (epoch 5): SIGTERM"),
        ({"how": "released", "previous": "n2"}, "it had itself given the key back"),
        ({"named": True}, "it was named as the successor"),
        ({"named": True, "by": "ops@h"}, "ops@h had named it"),
    ],
)
def test_every_way_to_lead_has_its_sentence(changes: dict[str, Any], words: str) -> None:
    """First one ever, released, its own earlier life, named."""
    came = msgspec.structs.replace(TOOK, **changes)
    standing = Standing(eligible=True, healthy_since=1.0, succession=came)
    assert words in text(told(STANDBY, status(Role.ACTIVE, standing)))


def test_the_succession_of_an_earlier_reign_is_not_told_of_this_one() -> None:
    """Rather nothing than something wrong."""
    standing = Standing(eligible=True, healthy_since=1.0, succession=msgspec.structs.replace(TOOK, epoch=3))
    assert "took over" not in text(told(STANDBY, status(Role.ACTIVE, standing)))


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (None, "it does not answer, though its session lives"),
        (status(Role.INELIGIBLE, Standing(), reason="unhealthy: disk full"), "no candidate: unhealthy: disk"),
        (status(Role.INELIGIBLE, Standing(), reason="vip eth0 is down"), "no candidate: vip eth0 is down"),
        (status(Role.STANDBY, Standing(True, no_failover=True)), "never takes over by itself (no_failover)"),
        (
            status(Role.STANDBY, Standing(aside_until=NOW + 2)),
            "steps aside for another 2.0 s after a hand-ov",
        ),
        (
            status(Role.STANDBY, Standing(aside_until=NOW + 2, failures=3), reason="it failed"),
            "another 2.0 s after 3 failures in a row (it failed)",
        ),
        (status(Role.STARTING), "it is starting"),
        (status(Role.STANDING_DOWN, reason="SIGTERM"), "it is standing down: SIGTERM"),
        (status(Role.ACTIVE, epoch=5, leader="n1"), "still says that it is active"),
        (status(Role.STANDBY, database=DatabaseState("following", lag_seconds=3.0)), "replica is 3.0 s beh"),
        (status(Role.STANDBY, Standing(eligible=False)), "it is no candidate"),
    ],
)
def test_every_reason_not_to_be_there_has_its_sentence(one: AppStatus | None, words: str) -> None:
    """Silent, ill, barred, stepping aside, behind, not aware."""
    [because] = [each.because for each in told(one, active()).not_there]
    assert words in because


def test_a_dead_node_is_told_from_a_silent_one() -> None:
    """Its session is over."""
    [because] = [each.because for each in told(None, active(), live=False).not_there]
    assert because.startswith("its session is over")


@pytest.mark.parametrize(
    ("nodes", "changes", "words"),
    [
        ((status(Role.STANDBY, **VACANT),), {}, "n1 is about to take the leader key"),
        (
            (status(Role.STANDBY, Standing(True, named="n1"), **VACANT),),
            {},
            "about to take the leader key (n1 is named)",
        ),
        (
            (status(Role.STANDBY, Standing(True, no_failover=True), **VACANT),),
            {},
            "never take over by themselves are left: n1; phalanx failover wiki --to n1",
        ),
        (
            (status(Role.INELIGIBLE, Standing(), reason="ill", **VACANT),),
            {"last_failure": "on n1: backend"},
            "waits: no node is an eligible candidate\nwaits: the last attempt failed: on n1: backend",
        ),
        ((), {}, "nobody leads wiki"),
        ((STANDBY, None), {}, "n2 to answer again, or its session to end; then n1 takes over"),
        (
            (status(Role.STANDBY, Standing(True, no_failover=True)), None),
            {},
            "nobody could take over by itsel",
        ),
        (
            (STANDBY, status(Role.ACTIVATING, Standing(step="promote", step_since=NOW - 3))),
            {},
            "n2 to become active: step promote since 3.0 s",
        ),
        (
            (STANDBY, status(Role.ACTIVATING, Standing(step="fence", step_since=NOW - 3, succession=TOOK))),
            {},
            "n1 to be fenced, for 3.0 s",
        ),
        (
            (STANDBY, status(Role.STANDING_DOWN, Standing(named="n1"), reason="asked")),
            {},
            "n2 to have stood down (asked); n1 is named to follow",
        ),
        (
            (STANDBY, active(pause=Pause("ops", 1.0, "move"))),
            {},
            "it is paused by ops: move: nothing changes",
        ),
        ((STANDBY, status(Role.ACTIVE)), {}, "the first healthy answer of n2"),
        (
            (STANDBY, active(program=ProgramStatus("process 1", ProgramState.STARTING, restarts=2))),
            {},
            "restarted in place 2 times in this section; it is starting now",
        ),
        (
            (STANDBY, active()),
            {"planned": PlannedSwitchover("wiki", NOW + 90, "n1", "night", "ops")},
            "a switchover to n1, planned by ops (night), in 90.0 s",
        ),
        (
            (STANDBY, active()),
            {"planned": PlannedSwitchover("wiki", NOW - 5)},
            "a switchover to the best standby, planned by somebody, due for 5.0 s",
        ),
        ((STANDBY, active(health=Health.UNHEALTHY, reason="http 500")), {}, "n2 is unhealthy: http 500"),
    ],
)
def test_what_it_waits_for(nodes: tuple[AppStatus | None, ...], changes: dict[str, Any], words: str) -> None:
    """Nobody, somebody silent, a step, a fence, a pause, a program, a planned switchover."""
    assert words in text(told(*nodes, **changes))


def test_a_better_standby_gets_nothing_back_by_itself() -> None:
    """That surprises people, so it is said, with what to do; not of one that may not take over."""
    better = status(Role.STANDBY, Standing(True, priority=5))
    found = told(better, active())
    assert found.hints == (
        "n1 has a higher priority (5) than n2 (0), but there is no fail-back by itself: "
        "phalanx switchover wiki --to n1",
    )
    assert told(status(Role.STANDBY, Standing(True, priority=5, no_failover=True)), active()).hints == ()


def test_the_highest_priority_is_given_as_the_reason() -> None:
    """Where it is the only one that high, and nobody was named."""
    mine = Standing(True, priority=9, healthy_since=1.0, succession=TOOK)
    assert "it has the highest priority (9)" in told(STANDBY, status(Role.ACTIVE, mine)).here
