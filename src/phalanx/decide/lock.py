"""Who holds a lock or a semaphore and who waits for it: what one session makes of the key's content.

One key holds all of it: at most ``permits`` holders (a lock: one), and the queue of those who wait, in the
order in which they came. It is replaced by compare-and-set only, so what is decided here is decided on what
is stored:

* Whoever finds a permit free and nobody waiting takes it by one write; else it goes to the end of the queue.
* Whoever gives a permit up hands it to the first of the queue by the same write: no newcomer comes in
  between.
* Entries whose session is over (or whose epoch is) are taken out by whoever sees that.
* One write grants one permit at most. The revision of that write is the grant's token: no two are the same,
  and a later grant has a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from phalanx.types import SessionId


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """Somebody who holds or waits. ``nonce`` tells claims of one session apart; ``epoch`` 0: under none.

    ``token``: of a holder; 0 where the grant is this very revision. ``since``: Unix seconds by the claimant's
    clock, for people.
    """

    session: SessionId
    nonce: str
    epoch: int = 0
    token: int = 0
    since: float = 0.0


class LockState(msgspec.Struct, frozen=True):
    """What the key says. ``by``: who has taken a permit away from its holder with this write, by force."""

    permits: int = 1
    holders: tuple[Entry, ...] = ()
    queue: tuple[Entry, ...] = ()
    by: str = ""

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds it, and nobody waits."""
        return not self.holders and not self.queue

    def holder(self, nonce: str) -> Entry | None:
        """The holder with that nonce."""
        return next((each for each in self.holders if each.nonce == nonce), None)


IsOver = Callable[[Entry], bool]
"""Whether an entry stands for nothing any more: its session is over for good, or its epoch is."""


def as_stored(state: LockState, revision: int) -> LockState:
    """What the key says at *revision*: grants of that very write get it as their token."""
    if all(each.token for each in state.holders):
        return state
    return msgspec.structs.replace(
        state,
        holders=tuple(
            each if each.token else msgspec.structs.replace(each, token=revision) for each in state.holders
        ),
    )


def without_over(state: LockState, is_over: IsOver) -> LockState:
    """The same without those who are gone for good."""
    return LockState(
        state.permits,
        tuple(each for each in state.holders if not is_over(each)),
        tuple(each for each in state.queue if not is_over(each)),
    )


def is_free(state: LockState) -> bool:
    """Whether a newcomer would get a permit at once. *state*: without those who are gone."""
    return len(state.holders) + len(state.queue) < state.permits


def next_state(
    state: LockState, permits: int, is_mine: IsOver, claims: Sequence[Entry], is_over: IsOver
) -> LockState:
    """What the key has to say next, by the one whose *claims* (in the order they came) are all that it holds
    or wants. ``is_mine``: whether an entry is of the same claimant; those that are not among the claims were
    given up. It never grants more than *permits*, and one at most."""
    wanted = {each.nonce for each in claims}

    def gone(entry: Entry) -> bool:
        return is_over(entry) or (is_mine(entry) and entry.nonce not in wanted)

    left = without_over(state, gone)
    known = {each.nonce for each in (*left.holders, *left.queue)}
    holders = list(left.holders)
    queue = [*left.queue, *(each for each in claims if each.nonce not in known)]
    if queue and len(holders) < permits:
        holders.append(msgspec.structs.replace(queue.pop(0), token=0))
    return LockState(permits, tuple(holders), tuple(queue))


def taken_away(state: LockState, token: int, by: str, is_over: IsOver) -> LockState:
    """The key after the holder with *token* was ended by force: the first of the queue has its permit."""
    left = without_over(state, is_over)
    holders = [each for each in left.holders if each.token != token]
    queue = list(left.queue)
    if queue and len(holders) < state.permits:
        holders.append(msgspec.structs.replace(queue.pop(0), token=0))
    return LockState(state.permits, tuple(holders), tuple(queue), by)


__all__ = [
    "Entry",
    "IsOver",
    "LockState",
    "as_stored",
    "is_free",
    "next_state",
    "taken_away",
    "without_over",
]
