"""Which steps make an app active, in which order, and what undoes them.

Becoming active goes through the steps in order; standing down undoes what was done, backwards. The
first failing step turns the whole thing around. Later steps of the design (services) take their places in
the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from phalanx.decide.backoff import Backoff

STABLE_SECONDS = 60.0
"""A section that was active for this long counts as healthy: failures before it are forgotten."""

STEP_ASIDE_SECONDS = 2.0
"""How long a node that was asked to step down leaves the app to others, if there are any."""


class Step(StrEnum):
    """One step of becoming active. The order of the members is the order of the steps."""

    REGISTER = "register"
    """The keeper learns that code of this section runs inside the node."""
    FENCE = "fence"
    """The previous leader's host, which did not end its session itself, is known to run nothing any more."""
    SEAL = "seal"
    """The WAL log is sealed under this epoch, and the replica has applied it to the seal."""
    PROMOTE = "promote"
    """The replica is the live database."""
    CAPTURE = "capture"
    """Nothing that is committed from now on can escape the capture, which is being started."""
    SEAL_EVENTS = "seal-events"
    """No leader of an earlier epoch can publish events any more."""
    VIP = "vip"
    """The virtual addresses are here, and the neighbours know it."""
    BACKEND = "backend"
    """The backend runs (it registers itself before it starts)."""
    READY = "ready"
    """It serves, by its ready check."""
    ON_ACTIVE = "on_active"
    """The hook has returned, or has said that it serves."""
    CAPTURED = "captured"
    """What is committed goes into the log. Late, as what writes starts just as long as Litestream does."""
    CALLS = "calls"
    """Calls to the leader are answered. Last: whoever is answered finds the app wholly active."""


class Undo(StrEnum):
    """One step of standing down."""

    END_CALLS = "end-calls"
    """No call is begun any more, those under way may end, within a deadline."""
    END_ON_ACTIVE = "end-on_active"
    ON_PASSIVE = "on_passive"
    STOP_BACKEND = "stop-backend"
    RELEASE_VIP = "release-vip"
    """After the backend: its connections are closed from the address that the clients know."""
    STOP_CAPTURE = "stop-capture"
    """Gracefully: the rest goes into the log, which is closed. Else Litestream is killed."""
    UNREGISTER = "unregister"


def steps(
    *,
    has_backend: bool,
    has_hooks: bool,
    has_database: bool = False,
    has_vip: bool = False,
    has_calls: bool = False,
    has_events: bool = False,
    needs_fence: bool = False,
) -> tuple[Step, ...]:
    """What becoming active takes. *needs_fence*: the previous leader is to be fenced first."""
    wanted = {
        Step.REGISTER: has_hooks or has_calls,
        Step.FENCE: needs_fence,
        Step.SEAL: has_database,
        Step.PROMOTE: has_database,
        Step.CAPTURE: has_database,
        Step.SEAL_EVENTS: has_events,
        Step.VIP: has_vip,
        Step.BACKEND: has_backend,
        Step.READY: has_backend,
        Step.ON_ACTIVE: has_hooks,
        Step.CAPTURED: has_database,
        Step.CALLS: has_calls,
    }
    return tuple(step for step in Step if wanted[step])


def undoing(begun: Iterable[Step], *, graceful: bool) -> tuple[Undo, ...]:
    """What undoes the steps that have *begun*, also a step that failed or was interrupted half-way.

    ``on_passive`` is for a graceful end only; the backend's own end is graceful or not by the caller.
    A section stays registered until all code of it has ended.
    """
    done = set(begun)
    plan: list[Undo] = []
    if Step.CALLS in done:
        plan.append(Undo.END_CALLS)
    if Step.ON_ACTIVE in done:
        plan.append(Undo.END_ON_ACTIVE)
        if graceful:
            plan.append(Undo.ON_PASSIVE)
    if Step.BACKEND in done:
        plan.append(Undo.STOP_BACKEND)
    if Step.VIP in done:
        plan.append(Undo.RELEASE_VIP)
    if done & {Step.SEAL, Step.PROMOTE, Step.CAPTURE, Step.CAPTURED}:
        # After whatever writes: what it wrote last is still captured.
        plan.append(Undo.STOP_CAPTURE)
    if Step.REGISTER in done:
        plan.append(Undo.UNREGISTER)
    return tuple(plan)


class Failures(msgspec.Struct, frozen=True):
    """Failed activations of one app on one node, in a row. ``not_before``: when it may try again."""

    count: int = 0
    not_before: float = float("-inf")
    reason: str = ""

    def failed(self, now: float, reason: str, retry: Backoff, *, steady_seconds: float = 0.0) -> Failures:
        """One more, after all went well for *steady_seconds*: if that was long, it is the first one again."""
        count = 1 if steady_seconds >= STABLE_SECONDS else self.count + 1
        return Failures(count, now + retry.delay(count), reason)

    def was_active(self, seconds: float) -> Failures:
        """A section ended without a failure of its own after it had been active for *seconds*.

        What was before it is forgotten, but not for how long this node has to leave the app to others now:
        it may just have stepped down, or been found ill.
        """
        return Failures(not_before=self.not_before) if seconds >= STABLE_SECONDS else self
