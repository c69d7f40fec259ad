"""The fence command before a takeover, as ``coord.fencer`` runs it; and what it does to a host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phalanx.decide.fencing import needless
from phalanx.types import FenceNote, SessionId

from .nats import RPC_TIMEOUT, UNANSWERED

if TYPE_CHECKING:
    from .node import Node
    from .world import Section

COMMAND_TIMEOUT = 0.8
RETRIES = 1


class Fencing:
    """What one reign has to have fenced, one session after the other, before it starts anything.

    Of *done* and *failed* one is called, unless the section ends before.
    """

    def __init__(
        self, node: Node, section: Section, done: Callable[[], None], failed: Callable[[str], None]
    ) -> None:
        self._node, self._section, self._done, self._failed = node, section, done, failed
        self._left = list(section.unfenced)
        self._runs = 0
        self._number = 0
        """Of the run under way: what comes of an earlier one does not count."""
        self.is_over = False

    def step(self) -> None:
        """Look at the next one."""
        if not self._left:
            self.is_over = True
            self._done()
            return
        node, nats, session = self._node, self._node.nats, self._left[0]
        nats.call(node, None, lambda: nats.bucket.living.get(session.node), RPC_TIMEOUT, self._member)

    def on_note(self, note: FenceNote) -> None:
        """Somebody says that a host is off: that ends the command."""
        if self._goes_on and note.session == self._left[0]:
            self._node.world.count("fence commands ended by an operator's word")
            self._next()

    @property
    def _goes_on(self) -> bool:
        section = self._section
        return not self.is_over and section is self._node.app.section and section.state == "starting"

    def _next(self) -> None:
        self._left.pop(0)
        self._runs = 0
        self._number += 1
        self.step()

    def _member(self, member: Any) -> None:
        if not self._goes_on:
            return
        if member is UNANSWERED:
            self._give_up("the member key cannot be read")
            return
        node, nats, session = self._node, self._node.nats, self._left[0]
        nats.call(node, None, lambda: nats.bucket.notes.get(session.node), RPC_TIMEOUT, self._note, member)

    def _note(self, note: Any, member: SessionId | None) -> None:
        if not self._goes_on:
            return
        node, world, session = self._node, self._node.world, self._left[0]
        if note is UNANSWERED:
            self._give_up("the notes cannot be read")
        elif needless(session, node.host.name, member, (note,)):
            world.count("needed no fencing any more")
            self._next()
        elif node.host.has_command:
            self._run()
        elif world.rules.broken == "not-fenced-without-a-command":
            self._next()
        else:
            world.count("not started by a node without a fence command")
            self._give_up("this node has no command")

    # --- the command

    def _run(self) -> None:
        world, node = self._node.world, self._node
        self._runs += 1
        self._number += 1
        problem = world.fence_problem
        takes = COMMAND_TIMEOUT if problem == "hangs" else world.rng.choice((0.02, 0.1, 0.4))
        world.log(node.name, f"fences {self._left[0]}, run {self._runs}")
        world.after(takes / node.host.rate, self._ends, self._left[0], self._number, not problem)

    def _ends(self, session: SessionId, number: int, succeeds: bool) -> None:
        """It ran apart from the node, which may be dead or stand still by now, and may have lost interest."""
        node, world = self._node, self._node.world
        wanted = node.alive and self._goes_on and number == self._number
        if succeeds and (wanted or world.rng.random() < 0.5):
            next(host for host in world.hosts if host.name == session.node).switch_off()
            world.count("hosts fenced")
        if wanted:
            node.run(self._ended, session, number, succeeds)

    def _ended(self, session: SessionId, number: int, succeeded: bool) -> None:
        if not self._goes_on or number != self._number:
            return
        node, nats = self._node, self._node.nats
        if succeeded:
            note = FenceNote(session, node.name, 0.0)
            nats.call(node, None, lambda: nats.note_fenced(note), RPC_TIMEOUT, self._noted)
            self._next()
        elif self._runs <= RETRIES:
            self._run()
        else:
            node.world.count("fence commands that failed")
            self._give_up("its command fails")

    def _noted(self, _result: Any) -> None:
        """Best effort."""

    def _give_up(self, why: str) -> None:
        self.is_over = True
        self._failed(f"{self._left[0]} is not fenced: {why}")
