"""What speaks against a planned hand-over."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.decide.switchover import MAX_LAG_SECONDS, MAX_SPOOL_BYTES, Ends, obstacle

FINE: dict[str, Any] = {
    "node": "n1",
    "target": "n2",
    "has_database": True,
    "phase": "live",
    "target_role": "following",
}


def test_nothing_speaks_against_it_when_both_ends_are_in_order() -> None:
    """With a database, a replica that is little behind, and without any database."""
    assert obstacle(Ends(**FINE)) is None
    assert obstacle(Ends(**FINE, target_lag_records=3, target_lag_seconds=MAX_LAG_SECONDS)) is None
    assert obstacle(Ends(**FINE, spool_bytes=MAX_SPOOL_BYTES)) is None
    assert obstacle(Ends(node="n1", target="n2")) is None


@pytest.mark.parametrize(
    ("changes", "words", "passes"),
    [
        ({"is_active": False}, "n1 is not active yet", True),
        ({"target": ""}, "no other node", False),
        ({"phase": "settling"}, "the database on n1", False),
        ({"problem": "the log refuses"}, "the log refuses", False),
        ({"spool_bytes": MAX_SPOOL_BYTES + 1}, "64 MiB", True),
        ({"target_role": ""}, "n2 does not say", True),
        ({"target_role": "broken", "target_reason": "no disk"}, "it is broken: no disk", False),
        ({"target_role": "bootstrapping"}, "it is bootstrapping", True),
        ({"target_lag_seconds": 9.0, "target_lag_records": 5}, "9.0 s (5 records) behind", True),
    ],
)
def test_what_could_lose_something_is_refused_with_a_remedy(
    changes: dict[str, Any], words: str, passes: bool
) -> None:
    """Each says what is wrong; only what passes by itself is worth waiting for."""
    found = obstacle(Ends(**{**FINE, **changes}))
    assert found is not None
    assert words in found.problem
    assert found.passes is passes
    assert found.remedy
