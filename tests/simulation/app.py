"""The app on one node: its active section, its address and its program, as ``phalanx.section`` runs them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from phalanx.decide.keeper import Phase, phase
from phalanx.decide.pause import Cause, ends_section
from phalanx.types import FenceNote, LeaderRecord

from .fence import Fencing
from .host import PIPE
from .nats import REFUSED, RPC_TIMEOUT
from .things import ADDRESS, PROGRAM, Thing
from .world import Section

if TYPE_CHECKING:
    from .node import Node

PROBE_TIMEOUT = 0.05
STOP_TIMEOUT = 0.4
"""A program that has not ended by then is killed."""


class App:
    """Begins and ends sections, one at a time."""

    def __init__(self, node: Node) -> None:
        self.node, self.host, self.world, self.nats = node, node.host, node.world, node.nats
        self.timing = node.world.timing
        self.section: Section | None = None
        self.section_things: list[Thing] = []
        self.end_takes = 0.05
        self.successor: str | None = None
        self.held = ""
        """What would have ended the section, had there been no pause."""
        self._fencing: Fencing | None = None
        self._waits_for_fence = self._keep_told = False
        self.adopted: list[Thing] = []
        """What ran when the session was taken up."""

    @property
    def is_kept(self) -> bool:
        """Whether what runs now is to outlive the node, should that end."""
        section = self.section
        active = section is not None and section.state == "active" and section.serving
        return active and self.node.election.paused and self.world.adoptable

    def tell_keep(self) -> None:
        """Tell the keeper whether the pause holds for what runs here."""
        keeper, keeps = self.node.keeper, self.is_kept
        if keeper is not None and keeps is not self._keep_told:
            self._keep_told = keeps
            self.world.after(PIPE, keeper.run, keeper.away.on_keep, keeps)

    def begin(self, epoch: int) -> None:
        if self.node.election.reign is not None or not self.node.session_valid():
            return
        self.node.election.reign, self.node.election.deposed, self.successor, self.held = (
            epoch,
            False,
            None,
            "",
        )
        self.section = section = Section(self.node, epoch)
        self.section_things = []
        self._fencing = None
        self.world.log(self.node.name, f"reigns at epoch {epoch}")
        if self.node.hold is not None:
            self.node.hold.begin()
        adopted = self.to_adopt(epoch)
        if adopted is not None:
            self._adopt(section, adopted)
            return
        section.unfenced = self.node.election.leader.unfenced
        if section.unfenced:
            self._fencing = Fencing(
                self.node, section, lambda: self._fenced(section), lambda why: self._not_fenced(section, why)
            )
            self._fencing.step()
        else:
            self._register(section)

    def to_adopt(self, epoch: int) -> Thing | None:
        """What an earlier life of the node has left running of that epoch."""
        return next((thing for thing in self.adopted if thing.section.epoch == epoch), None)

    def _adopt(self, section: Section, thing: Thing) -> None:
        self.adopted = []
        self._keep_told = True
        section.stop_takes = thing.section.stop_takes
        self.world.adopt_section(section, thing)
        self.section_things = [thing]
        self._write_fenced(section.epoch)
        if not thing.present:
            self.fail()
        self.tell_keep()

    def _fenced(self, section: Section) -> None:
        section.unfenced = ()
        self._register(section)

    def _not_fenced(self, section: Section, why: str) -> None:
        self._waits_for_fence = True
        self.world.log(self.node.name, f"does not start: {why}")
        self._over(section)

    def on_fenced(self, note: FenceNote) -> None:
        """Somebody says that nothing of a session runs any more: what waits for that is tried again."""
        if self._fencing is not None:
            self._fencing.on_note(note)
        if self._waits_for_fence:
            self._waits_for_fence = False
            self.node.election.not_before = self.host.clock()

    def _register(self, section: Section) -> None:
        if self.world.adoptable:  # it has no code in the node
            self.on_registered(section)
            return
        keeper = self.node.keeper
        if keeper is not None:
            self.world.after(PIPE, keeper.run, keeper.on_register, section)

    def on_registered(self, section: Section) -> None:
        """The keeper would kill it from now on: begin, unless it is too late."""
        if section is not self.section or section.state != "starting":
            return
        if (
            not self.node.session_valid()
            or phase(self.host.clock(), self.node.valid_until, self.timing) is not Phase.WORK
        ):
            self._over(section)
            return
        self.world.start_section(section)
        self._write_fenced(section.epoch)
        self._register_thing(Thing(section, PROGRAM if self.world.adoptable else ADDRESS))

    # --- its address and its program

    def _register_thing(self, thing: Thing) -> None:
        self.host.things = [other for other in self.host.things if other.present] + [thing]
        self.section_things.append(thing)
        if thing.kind == PROGRAM and self.world.rules.broken == "started-before-registered":
            self.on_thing_registered(thing)
        elif self.node.keeper is not None:
            self.world.after(PIPE, self.node.keeper.run, self.node.keeper.on_register_thing, thing)

    def on_thing_registered(self, thing: Thing) -> None:
        """From now on it would be killed: start it, unless the section ends already."""
        section = thing.section
        if not self._goes_on(section):
            return
        if thing.kind == ADDRESS:
            self._probe(thing, self.host.clock())
            return
        thing.appear()
        section.stop_takes = self.world.rng.choice((0.005, 0.02, 0.02, 0.1, 0.1, 0.2, STOP_TIMEOUT))
        takes = self.world.rng.choice((0.01, 0.01, 0.05, 0.2, 1.0))
        self.node.timer(takes, self._started, thing, self.world.rng.random() < 0.04)

    def _goes_on(self, section: Section) -> bool:
        covered = self.node.session_valid() or self.node.is_held(self.host.clock())
        return section is self.section and section.state == "active" and covered

    def _probe(self, thing: Thing, since: float) -> None:
        if not self._goes_on(thing.section):
            return
        taken = self.world.address_elsewhere(self.host)
        if taken and self.world.rules.broken != "address-not-probed":
            self.world.count("addresses that somebody else still answered for")
            if self.host.clock() - since > math.ceil(self.timing.ttl) + 1.5:
                self.world.fail("address", f"{self.node.name} still finds it elsewhere after its lifetime")
            self.node.timer(0.1, self._probe, thing, since)
        else:
            self.node.timer(PROBE_TIMEOUT, self._put, thing)

    def _put(self, thing: Thing) -> None:
        if self._goes_on(thing.section):
            thing.appear()
            self._prolong(thing)
            self._register_thing(Thing(thing.section, PROGRAM))

    def _prolong(self, thing: Thing) -> None:
        left = self.node.right_until(self.host.clock()) - self.host.clock()
        if thing.present and not thing.dying and thing.section is self.section:
            if left > 0:
                thing.prolong(math.ceil(min(self.timing.ttl, left)))
            self.node.timer(self.timing.ttl / 4, self._prolong, thing)

    def address_lost(self, section: Section) -> None:
        """The kernel has removed it."""
        if section is self.section and section.state == "active":
            self.end("its address is gone")

    def _started(self, thing: Thing, fails: bool) -> None:
        if thing.section is not self.section:
            return
        if fails:
            thing.vanish("its start has failed")
            self.world.count("starts of a program that failed")
            self.end("its program cannot be started")
        elif thing.present:
            thing.section.serving = True
            self.tell_keep()

    def _stop_program(self, section: Section) -> None:
        """Gracefully: after that it is killed, if it does not end."""
        if section is not self.section:
            return
        running = [thing for thing in self.section_things if thing.present and thing.kind == PROGRAM]
        if not running:
            self._stopped(section)
        elif section.stop_takes < STOP_TIMEOUT:
            self.node.timer(section.stop_takes, self._stopped, section)
        else:
            self.world.count("programs that had to be killed")
            self.node.timer(STOP_TIMEOUT, self._kill_program, section)

    def _kill_program(self, section: Section) -> None:
        if section is not self.section:
            return
        running = [thing for thing in self.section_things if thing.present and thing.kind == PROGRAM]
        for thing in running:
            thing.kill()
        if running:
            self.node.timer(0.01, self._kill_program, section)
        else:
            self._stopped(section)

    def _stopped(self, section: Section) -> None:
        if section is not self.section:
            return
        for kind in (PROGRAM, ADDRESS):
            for thing in self.section_things:
                if thing.kind == kind:
                    thing.vanish("ended")
                    if self.node.keeper is not None:
                        self.world.after(
                            PIPE, self.node.keeper.run, self.node.keeper.on_unregister_thing, thing
                        )
        self._over(section)

    def _write_fenced(self, epoch: int) -> None:
        """A leader's write; and now and then one whose epoch is long gone."""
        self.nats.call(self.node, None, lambda: self.nats.fenced(epoch), RPC_TIMEOUT, self._written, epoch)

    def _written(self, result: Any, epoch: int) -> None:
        if result is not REFUSED or self.node.election.reign == epoch:
            self.node.timer(self.world.rng.uniform(0.5, 1.5), self._write_fenced, epoch)

    # --- the end

    def end(self, reason: str, successor: str | None = None) -> None:
        """Begin to end the active section, gracefully."""
        section = self.section
        if section is None or section.state == "ending":
            return
        self.world.log(self.node.name, f"ends its section: {reason}")
        self.successor = section.successor = successor
        if section.state == "starting":
            self._over(section)
            return
        section.state = "ending"
        self.tell_keep()
        self.node.timer(self.end_takes, self._stop_program, section)

    def _over(self, section: Section) -> None:
        if section is not self.section:
            return
        self.world.end_section(section, "gracefully")
        keeper, epoch = self.node.keeper, section.epoch
        self.section = self.node.election.reign = None
        self.node.election.last_reign = max(self.node.election.last_reign, epoch)
        if keeper is not None:
            self.world.after(PIPE, keeper.run, keeper.on_unregister, section)
        if not self.node.election.deposed:
            record = LeaderRecord(0, None, self.successor, unfenced=section.unfenced)
            self.node.election.unreleased = (epoch, record)
        self.node.election.not_before = self.host.clock() + 1.0
        self.node.step()

    def hand_over(self) -> None:
        """An operator's stepdown: the successor is named while the old section is still active."""
        if self.section is not None and self.section.state == "active" and not self.node.election.paused:
            self.world.count("stepdowns")
            self.end("stepdown", self.node.election.choose())

    def fail(self) -> None:
        """Its program, or a check: in a pause that is only reported."""
        if self.section is None or self.section.state == "ending":
            return
        if ends_section(Cause.FAILED, paused=self.node.election.paused):
            self.world.count("sections that failed")
            self.end("it fails")
        else:
            self.held = "it failed in a pause"
            self.world.count("failures held in a pause")
