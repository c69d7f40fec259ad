"""Ends a node's active sections in time, whatever its session does.

One :class:`Guard` for each session. It asks gracefully first, and fences when the session's end, a second
signal or a lost session leave no time. If sections do not end then, the node ends itself: nobody else may
start before they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Collection, Generator
from typing import Protocol

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.app import NodeApp
from phalanx.coord.hold import Holds
from phalanx.coord.session import Session
from phalanx.decide.hold import hands_over
from phalanx.decide.keeper import Phase, next_phase_at, phase
from phalanx.decide.timing import Timing
from phalanx.observe.journal import Journal

log = logging.getLogger("phalanx.node")

FENCE_WAIT_SECONDS = 3.0
"""Sections that are fenced have to end within this, or within what the session has left."""

HAND_OVER_SECONDS = 5.0
"""How long the other apps may take to go when one that is stuck will end the node."""


class Watched(Protocol):
    """What the guard looks at besides the session."""

    @property
    def stop_reason(self) -> str:
        """Why the node is to stop; empty while it is not."""
        ...

    @property
    def in_a_hurry(self) -> bool:
        """Whether it is to stop without grace."""
        ...

    def keeps(self, app: NodeApp) -> bool:
        """Whether *app* is not to change hands although the node stops: it is paused."""
        ...

    @property
    def disconnected_at(self) -> float | None:
        """Since when the node itself has no connection to NATS."""
        ...


class Guard:
    """Call :meth:`run`; :meth:`wake` whenever something of :class:`Watched` has changed."""

    def __init__(
        self,
        apps: Collection[NodeApp],
        session: Session,
        holds: Holds,
        timing: Timing,
        watched: Watched,
        journal: Journal,
    ) -> None:
        self._holds = holds
        self._apps, self._session, self._timing = apps, session, timing
        self._watched, self._journal = watched, journal
        self._wake = asyncio.Event()
        self._held: set[str] = set()
        self._leaving_since: float | None = None
        self._leaving_reason = ""

    def wake(self) -> None:
        """Look again now."""
        self._wake.set()

    async def run(self) -> None:
        """Until the session is lost, or is to be given up and all sections have ended."""
        warned = False
        with self._woken_by_apps():
            while True:
                self._wake.clear()
                now = system.now()
                if self._session.lost.is_set():
                    await self.fence_all(f"the session is lost: {self._session.lost_reason}")
                    return
                if self._leaves(now) and all(app.is_idle for app in self._apps):
                    return
                if self._outlived(now):
                    return
                current = phase(now, self._session.valid_until, self._timing)
                if current is Phase.STAND_DOWN and not warned:
                    self._journal.node(
                        "standing-down", reason="no renewal of the session in time", level=logging.ERROR
                    )
                warned = current is not Phase.WORK
                self._note_held(now, current)
                self._act(now)
                await wait_at_most(self._wake, max(0.001, self._next_look(now) - now))

    @contextlib.contextmanager
    def _woken_by_apps(self) -> Generator[None]:
        for app in self._apps:
            app.on_idle(self.wake)
        self._session.on_change(self.wake)
        try:
            yield
        finally:
            for app in self._apps:
                app.on_idle(None)
            self._session.off_change(self.wake)

    def _leaves(self, now: float) -> bool:
        """Whether the session is to be given up; asks for the end of everything from then on."""
        reason = self._watched.stop_reason or self._cut_off(now)
        if reason and self._leaving_since is None:
            self._leaving_since, self._leaving_reason = now, reason
            for app in self._apps:
                app.bar(reason)
        if self._leaving_since is not None:
            # At every look: a leader key that was on its way when the apps were barred may come after that.
            for app in self._apps:
                if self._watched.stop_reason and self._watched.keeps(app):
                    app.leave(self._leaving_reason)
                else:
                    app.end_section(self._leaving_reason)
        return self._leaving_since is not None

    def _cut_off(self, now: float) -> str:
        """The keeper's connection may be fine; if ours is gone nobody can reach what we lead."""
        since = self._watched.disconnected_at
        if since is None or now - since < self._timing.ttl:
            return ""
        active = [app for app in self._apps if app.has_section]
        if active and all(app.is_paused for app in active):
            return ""  # nobody could take over what would end here
        if any(self._is_held(app, now) for app in active):
            for app in active:
                if not self._is_held(app, now):
                    app.end_section("the node has no connection to NATS")
            return ""
        if self._leaving_since is None:
            self._journal.node(
                "cut-off",
                reason=f"no connection to NATS for {self._timing.ttl:g} s; giving the session up",
                level=logging.ERROR,
            )
        return "the node has no connection to NATS"

    # --- apps that hold

    def _right_until(self, app: NodeApp, now: float) -> float:
        return self._holds.right_until(app.name, now, self._session.valid_until)

    def _is_held(self, app: NodeApp, now: float) -> bool:
        return self._holds.is_held(app.name, now)

    def _note_held(self, now: float, current: Phase) -> None:
        for app in self._apps:
            held = current is not Phase.WORK and app.has_section and self._is_held(app, now)
            if held is (app.name in self._held):
                continue
            if held:
                self._held.add(app.name)
                reason = "all members have promised that they do not take over"
                self._journal.app(app.name, "holding", reason=reason, level=logging.WARNING)
            else:
                self._held.discard(app.name)

    def _outlived(self, now: float) -> bool:
        """Whether the session ran out under an app that was held, and nothing of it is left to end or give
        back; hands over what is left when NATS is there again."""
        if now < self._session.valid_until or not self._session.was_extended:
            return False
        self._session.note_outlived()
        left = [app for app in self._apps if not app.is_idle]
        if not left:
            return True
        for app in left:
            back_since = self._holds.nats_back_since(app.name)
            if back_since is None:
                continue
            can, waits = app.others_can(), app.spool_bytes
            if hands_over(now, back_since, self._timing, has_successor=can, spool_bytes=waits):
                app.end_section("NATS is back, and the session is over")
        return False

    def _act(self, now: float) -> None:
        for app in self._apps:
            match phase(now, self._right_until(app, now), self._timing):
                case Phase.FENCE | Phase.OVER:
                    app.fence("the session runs out")
                case Phase.STAND_DOWN:
                    app.end_section("the session is about to run out")
                case Phase.WORK:
                    pass
        if self._watched.in_a_hurry:
            self._fence(self._watched.stop_reason)
        elif self._is_late(now):
            self._fence("the node has no connection to NATS")

    def _is_late(self, now: float) -> bool:
        """A node that is cut off gets the grace, a node that stops all the time its hooks may take."""
        leaving = self._leaving_since
        return leaving is not None and not self._watched.stop_reason and now - leaving > self._timing.grace

    def _fence(self, reason: str) -> None:
        for app in self._apps:
            app.fence(reason)

    def _next_look(self, now: float) -> float:
        moments = [next_phase_at(now, self._right_until(app, now), self._timing) for app in self._apps]
        moment = min([*moments, now + self._timing.ttl])
        if self._session.was_extended:
            moment = min(moment, now + 0.1)
        if self._leaving_since is not None:
            moment = min(moment, now + 0.1)
        if (since := self._watched.disconnected_at) is not None:
            moment = min(moment, max(now, since + self._timing.ttl))
        return moment

    async def fence_all(self, reason: str) -> None:
        """End all sections at once; if they do not end, each within its own right, end the node."""
        sections = [app for app in self._apps if app.has_section]
        if not sections:
            return
        self._fence(reason)
        began = system.now()
        # One that is held may take as long as its promises reach, though the session is long over.
        rights = sorted(((self._right_until(app, began), app) for app in sections), key=lambda pair: pair[0])
        try:
            for right_until, app in rights:
                left = right_until - self._timing.fence_budget / 2 - began
                deadline = began + min(FENCE_WAIT_SECONDS, max(0.2, left))
                async with asyncio.timeout(max(0.0, deadline - system.now())):
                    await app.wait_ended()
        except TimeoutError:
            die(self._journal, f"sections do not end ({reason})")

    async def hand_over_others(self, stuck: NodeApp) -> None:
        """Before the node ends because of *stuck*: hand the other apps over gracefully, bounded.

        They are barred, so that none returns. If *stuck* has ended after all they are candidates again.
        """
        reason = f"app {stuck.name} does not end, so the node will"
        others = [app for app in self._apps if app is not stuck]
        for app in others:
            app.bar(reason)
        for app in others:
            app.end_section(reason)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HAND_OVER_SECONDS):
                for app in others:
                    await app.wait_idle()
        if not stuck.has_section and self._leaving_since is None:
            for app in others:
                app.bar("")


def die(journal: Journal, reason: str) -> None:
    """SIGKILL to ourselves: the keeper, where it lives, kills what we started and releases."""
    log.critical("this node kills itself: %s", reason)
    journal.node("suicide", reason=reason, level=logging.CRITICAL)
    os.kill(os.getpid(), signal.SIGKILL)
