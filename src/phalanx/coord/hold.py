"""A node's part in apps that hold: what it promises to others, and what it has been promised.

One :class:`Holds` lives as long as the process: what it has promised must outlive its sessions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from phalanx import system
from phalanx.coord.direct import Answer, Direct, Question, resolve
from phalanx.coord.session import Session
from phalanx.decide.hold import NEVER, Ask, Claim, Member, asks_now
from phalanx.decide.timing import Timing
from phalanx.types import SessionId

log = logging.getLogger("phalanx.hold")

LOOK_UP_SECONDS = 60.0
"""After so long a host's name is looked up again: it may have another address now."""


class _Place(NamedTuple):
    """Where a node is reached, and when that was looked up."""

    place: tuple[str, int]
    looked_up_at: float


class _Reign:
    """One reign of this node over an app that holds."""

    def __init__(self, app: str, epoch: int, session: Session, claim: Claim) -> None:
        self.app, self.epoch, self.session, self.claim = app, epoch, session, claim
        self.sent: dict[int, tuple[str, float, bool]] = {}
        """By number of the question: whom it was sent to, when, and whether it asks for a promise."""
        self.heard: dict[str, tuple[float, str]] = {}
        """When each node has answered last, and its refusal."""
        self.told = NEVER
        self.probe_at = NEVER
        self.nats_back_since: float | None = None
        """Since when NATS has answered again, after the session was over."""


class Holds:
    """What this node has promised, and its own claims. ``address``: where it is reached, empty: nowhere.

    *leads* says whether a section of an app runs here, *is_fenced* whether somebody has seen to it that
    nothing of a session runs.
    """

    def __init__(
        self,
        timing: Timing,
        node: str,
        leads: Callable[[str], bool],
        is_fenced: Callable[[SessionId], bool] = lambda session: False,
    ) -> None:
        self.timing, self._node, self._leads, self.is_fenced = timing, node, leads, is_fenced
        self.member = Member(timing, system.now())
        self.address = ""
        self.direct: Direct | None = None
        self._seen: dict[str, int] = {}
        self._reigns: dict[str, _Reign] = {}
        self._places: dict[str, _Place] = {}
        self._lookups: dict[str, asyncio.Task[None]] = {}
        # Also the next life of a node that takes its session up asks with numbers that were never used in it:
        # else an answer to the earlier life, late or repeated by somebody, would pass for one to this.
        self._number = int(system.now() * 1e6)

    @property
    def ignored(self) -> int:
        """Datagrams that were not understood, not signed, or for somebody else."""
        return self.direct.ignored if self.direct is not None else 0

    # --- as one that could follow

    def saw(self, app: str, revision: int) -> None:
        """The leader key of *app* is at *revision*, or was."""
        self._seen[app] = max(self._seen.get(app, 0), revision)

    def on_question(self, question: Question) -> str:
        """See Listener."""
        ask = question.ask
        if ask.session.node != question.sender:
            return "it asks for somebody else"
        refusal = self.member.answer(
            ask, seen=self._seen.get(ask.app, 0), leads=self._leads(ask.app), now=system.now()
        )
        if refusal:
            log.warning("app %s: nothing is promised to %s: %s", ask.app, question.sender, refusal)
        return refusal

    # --- as the leader

    def begin(self, app: str, epoch: int, session: Session) -> Claim:
        """A reign begins: its claim, to be told of the member list."""
        claim = Claim(self.timing, self._node)
        self._reigns[app] = _Reign(app, epoch, session, claim)
        return claim

    def end(self, app: str) -> None:
        """Nothing of it runs any more."""
        self._reigns.pop(app, None)

    def right_until(self, app: str, now: float, valid_until: float) -> float:
        """Until when the section of *app* may go on."""
        reign = self._reigns.get(app)
        return reign.claim.right_until(now, valid_until) if reign is not None else valid_until

    def is_held(self, app: str, now: float) -> bool:
        """Whether it goes on by promises, whatever becomes of the session."""
        reign = self._reigns.get(app)
        return reign is not None and now < reign.claim.until(now)

    def note_nats(self, app: str, answers: bool) -> None:
        """Whether NATS answers now that the session is over."""
        reign = self._reigns.get(app)
        if reign is not None and (reign.nats_back_since is None) is answers:
            reign.nats_back_since = system.now() if answers else None

    def nats_back_since(self, app: str) -> float | None:
        """Since when it does; None: it does not, or nothing is held."""
        reign = self._reigns.get(app)
        return reign.nats_back_since if reign is not None else None

    def missing(self, app: str) -> dict[str, str]:
        """Which members would not promise as far as is known, and why."""
        reign = self._reigns.get(app)
        if reign is None:
            return {}
        silent = system.now() - 2 * self.timing.ttl
        found = {node: reign.heard.get(node, (NEVER, "")) for node in reign.claim.asked}
        mute = {node for node, address in reign.claim.asked.items() if not address}
        return {
            node: "it does not hold" if node in mute else refusal or "it does not answer"
            for node, (at, refusal) in found.items()
            if refusal or at < silent
        }

    def describe(self, app: str, session: Session) -> tuple[float, str]:
        """How long *app* may go on without the session that is over (0: not at all), and that in words."""
        reign = self._reigns.get(app)
        if reign is None:
            return 0.0, ""
        left = reign.claim.until(system.now()) - system.now()
        if not session.is_valid and left > 0:
            return left, f"goes on without NATS: {', '.join(sorted(reign.claim.asked))} have promised"
        if not reign.claim.is_known:
            return 0.0, "would not go on without NATS: who could take over is not known yet"
        if missing := self.missing(app):
            why = "; ".join(f"{node}: {problem}" for node, problem in sorted(missing.items()))
            return 0.0, f"would not go on without NATS: {why}"
        return 0.0, "would go on without NATS"

    def on_answer(self, answer: Answer) -> None:
        """See Listener."""
        reign = self._reigns.get(answer.app)
        if reign is None or reign.session.id != answer.session:
            return
        to, sent_at, promises = reign.sent.pop(answer.number, ("", NEVER, False))
        if to != answer.sender:
            return
        now = system.now()
        reign.heard[to] = (now, answer.refusal)
        if promises and not answer.refusal:
            reign.claim.on_promise(to, sent_at, now, reign.session.valid_until)
            self._extend(reign, now)

    async def run(self) -> None:
        """Ask for promises when they are needed; else, now and then, whether they would be given."""
        try:
            while True:
                for reign in list(self._reigns.values()):
                    self._look(reign)
                await asyncio.sleep(self.timing.renew_every / 2)
        finally:
            for lookup in self._lookups.values():
                lookup.cancel()

    def _look(self, reign: _Reign) -> None:
        now = system.now()
        needed = asks_now(now, reign.session.valid_until, self.timing)
        if needed or now >= reign.probe_at:
            reign.probe_at = now + self.timing.ttl
            for node, address in reign.claim.asked.items():
                self._ask(reign, node, address, self.timing.ttl if needed else 0.0)
        self._extend(reign, now)

    def _ask(self, reign: _Reign, node: str, address: str, lease: float) -> None:
        place = self._place(address)
        if place is None:
            return
        now = system.now()
        self._number += 1
        reign.sent[self._number] = (node, now, lease > 0)
        reign.sent = {n: sent for n, sent in reign.sent.items() if now - sent[1] < self.timing.ttl}
        if self.direct is not None:
            ask = Ask(reign.app, reign.epoch, reign.session.id, self._number, lease)
            self.direct.ask(place, node, ask)

    def _place(self, address: str) -> tuple[str, int] | None:
        """Where that is, if it is known yet."""
        known = self._places.get(address)
        is_fresh = known is not None and system.now() - known.looked_up_at < LOOK_UP_SECONDS
        if address and not is_fresh and address not in self._lookups:
            # One at a time, and nobody waits: a name server that does not answer takes long to give up.
            self._lookups[address] = asyncio.create_task(self._look_up(address), name=f"look up {address}")
        return known.place if known is not None else None

    async def _look_up(self, address: str) -> None:
        try:
            place = await resolve(address)
        finally:
            self._lookups.pop(address, None)
        known = self._places.get(address)
        if known is not None and place in (None, known.place):
            # Kept, as a name server may be gone with NATS; and it is asked again after a while.
            self._places[address] = _Place(known.place, system.now())
        elif place is not None:
            self._places[address] = _Place(place, system.now())
            for reign in self._reigns.values():
                reign.probe_at = NEVER

    def _extend(self, reign: _Reign, now: float) -> None:
        until = reign.claim.until(now)
        more = until > reign.told and asks_now(now, reign.session.valid_until, self.timing)
        if more and reign.session.extend(reign.app, until):
            reign.told = until


__all__ = ["Holds"]
