"""What users declare of an app's events."""

from __future__ import annotations

from typing import Annotated

from phalanx.config import rules
from phalanx.config.aliases import ByteCount, Seconds, default
from phalanx.config.databases import DAY, MIB, TIB
from phalanx.config.declaration import Declaration
from phalanx.config.rules import About


class Events(Declaration, frozen=True, kw_only=True):
    """The app has a stream of events of its own, which its nodes publish and handle."""

    max_age: Annotated[
        Seconds,
        About(
            "Events that are older are dropped, also those that a durable consumer has not seen.",
            rules.Duration(1, 3650 * DAY),
            trade_off="How long a consumer may stand still, and how far back a replay goes, against storage.",
        ),
    ] = default(7 * DAY)
    max_bytes: Annotated[
        ByteCount,
        About(
            "All events together; beyond it the oldest are dropped, also those that no consumer has seen.",
            rules.Bytes(MIB, TIB),
            trade_off="It bounds the storage, and what a burst of events can push out.",
        ),
    ] = default(1 << 30)
