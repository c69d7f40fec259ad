"""Whom to fence before a takeover, and who needs none (any more).

A session that its own side has ended left nothing behind. One that others found silent may go on somewhere.
If its node, or that of the next leader, declares a fence command, nothing of the app starts before that has
succeeded, an operator has said that the host is off, or the node's next life has ended what was left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from phalanx.types import FenceNote, LeaderRecord, SessionId


def to_be_fenced(
    me: SessionId, leader: LeaderRecord, ended_itself: Callable[[SessionId], bool], *, fences: bool
) -> tuple[SessionId, ...]:
    """Whom the reign after *leader* has to fence before it starts anything: of each node the latest session.

    *fences*: this node declares a command. One that does not passes on what is still to be done, and the last
    leader with it if that one asks for it (``LeaderRecord.fences``): it is not dropped, others can do it.
    """
    found = {session.node: session for session in leader.unfenced}
    holder = leader.session
    if holder is not None and holder != me and (fences or leader.fences) and not ended_itself(holder):
        found[holder.node] = holder
    return tuple(found.values())


def needless(session: SessionId, me: str, member: SessionId | None, notes: Iterable[FenceNote | None]) -> str:
    """Why *session* needs no fencing by node *me*; empty if it does.

    *member*: what its node's member key says now. A session is there before it can lead, and after its keeper
    has ended what earlier lives left; so another one there is a later one. *notes*: those about its node, of
    all of it and of the app.
    """
    if session.node == me:
        return "it was of this very node, whose keeper has ended what it left"
    if member is not None and member != session:
        return f"its node has begun session {member.nonce} since, and ended what it left"
    for note in notes:
        if note is not None and note.session == session:
            return f"it is off, by {note.by}"
    return ""
