"""The parts of a schedule, and the promises that are checked after every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.virtual_time import VirtualTime

from phalanx.decide.timing import Timing
from phalanx.types import Nomination, SessionId

from .breaks import Rules

if TYPE_CHECKING:
    from .hold import Peers
    from .host import Host
    from .nats import Bucket, Nats, Pausing
    from .node import Node
    from .things import Thing


@dataclass(slots=True, eq=False)
class Section:
    """One active section: from when it may do its first work to when it can do none any more."""

    node: Node
    epoch: int
    state: str = "starting"
    serving: bool = False
    """Its address is here, and its program has started."""
    stop_takes: float = 0.0
    began: float = -1.0
    successor: str | None = None
    """Whom its node named, before it ended."""
    unfenced: tuple[SessionId, ...] = ()
    """Whom its node has to have fenced before it starts anything."""
    excused: bool = False
    """Another one began while this one's host could neither run it nor end it (frozen, both stopped)."""


class World(VirtualTime):
    """One schedule: the clock of true time, the parts, what is true about them."""

    def __init__(self, seed: int, rules: Rules, *, tracing: bool = False) -> None:
        super().__init__(seed, tracing=tracing)
        self.rules = rules
        self.timing = Timing()
        self.hosts: list[Host] = []
        self.nats: Nats
        self.holds = False
        """Whether there are nodes whose app holds when NATS is lost."""
        self.peers: Peers
        self.disturbances = 0
        """How many faults have begun or ended so far: lets a check see that nothing happened between."""
        self.faults_active = 0
        self.calm_for = 0.0
        """How long nothing had happened when the latest fault began or ended."""
        self.active: list[Section] = []
        self.last_epoch = 0
        self.begun: list[Section] = []
        """All sections, whether or not they still go on: some programs do not start."""
        self.last_fenced = 0
        self.fence_problem = ""
        """What is wrong with everybody's fence command: it "fails", or "hangs"; empty: nothing."""
        self.adoptable = False
        """The app is a program of its own and nothing else, so that it can outlive its node in a pause."""
        self.away_seconds = 600.0
        self.owed: set[SessionId] = set()
        """Leaders that had to be fenced when the leader key was taken from them: nothing of them may run when
        the next section begins, whatever was dead or stood still there."""
        self.over_at: dict[SessionId, float] = {}

    # --- what must hold

    def start_section(self, section: Section) -> None:
        """G1 and G2, where a section begins."""
        node = section.node
        begins = f"{node.name} begins at epoch {section.epoch}"
        for other in self.active:
            if self._is_only_a_name(other):
                other.excused = True
                continue
            if other.node.session in self.owed:
                self.fail("fence", f"{begins} before {other.node.name}, active at {other.epoch}, is fenced")
            if other.node.may_work and (other.node.keeper_runs or not other.node.blocked):
                self.fail("G1", f"{begins} while {other.node.name} is active at {other.epoch}")
            if other.node.keeper_runs:
                self.fail(
                    "G1",
                    f"{begins}; {other.node.name}, stopped, still has {other.epoch} and its keeper runs",
                )
            self.count(
                "excused: loop blocked and no keeper" if other.node.blocked else "excused: both were stopped"
            )
            other.excused = True
        self._check_programs(section, begins)
        if section.epoch <= self.last_epoch:
            self.fail("G2", f"epoch {section.epoch} begins after epoch {self.last_epoch}")
        if self.last_epoch:
            self.count("leader changes")
        self.last_epoch = section.epoch
        self.begun.append(section)
        section.state, section.began = "active", self.now
        self.active.append(section)
        self.log(node.name, f"ACTIVE at epoch {section.epoch}")

    def _is_only_a_name(self, section: Section) -> bool:
        """Of an app that is a program and nothing else: its keeper has ended that, the node stands still."""
        node = section.node
        runs = any(thing.present and thing.section is section for thing in node.host.things)
        return self.adoptable and not runs and (node.stopped or node.blocked)

    def adopt_section(self, section: Section, thing: Thing) -> None:
        """G1 and G2, where a section goes on in the node's next life with what the earlier one has left."""
        old = thing.section
        if old.epoch != section.epoch:
            self.fail("G2", f"{section.node.name} adopts a program of {old.epoch} at epoch {section.epoch}")
        if self.active or section.epoch != self.last_epoch:
            self.fail("G1", f"{section.node.name} adopts {section.epoch} beside a section that goes on")
        thing.section = section
        section.state, section.began, section.serving = "active", self.now, thing.present
        self.begun.append(section)
        self.active.append(section)
        self.count("programs adopted")
        self.log(section.node.name, f"ACTIVE again at epoch {section.epoch}")

    def _check_programs(self, section: Section, begins: str) -> None:
        for host in self.hosts:
            for thing in host.things:
                if thing.present and thing.kind == "program" and thing.section is not section:
                    where = f"{begins} while the program of {thing.section.epoch} runs on {host.name}"
                    if thing.section.node.session in self.owed:
                        self.fail("fence", where)
                    if thing.is_guarded or host is section.node.host:
                        self.fail("G1", where)
                    self.count("excused: a program that nobody could end")

    def address_elsewhere(self, host: Host) -> bool:
        """Whether another host answers for the address."""
        return any(t.present and t.kind == "address" for h in self.hosts if h is not host for t in h.things)

    def thing_appears(self, thing: Thing) -> None:
        """An address is on one host at a time; a program has none of an older epoch beside it."""
        if thing.kind == "address":
            if self.address_elsewhere(thing.host):
                self.fail("address", f"{thing.host.name} takes the address while another host has it")
        else:
            self._check_programs(thing.section, f"the program of epoch {thing.section.epoch} starts")

    def nothing_left(self) -> bool:
        """Whether nothing of an ended section is on any host."""
        now = self.active[-1] if self.active else None
        return not any(t.present and t.section is not now for host in self.hosts for t in host.things)

    def end_section(self, section: Section, how: str) -> None:
        """Nothing of it runs any more."""
        section.state = "ended"
        if section in self.active:
            self.active.remove(section)
            self.log(section.node.name, f"active section of epoch {section.epoch} ended: {how}")

    def session_over(self, session: SessionId, by: str) -> None:
        """An observer or a holder finds *session* over: from now on it must be so for its holder."""
        if session not in self.over_at:
            self.over_at[session] = self.now
            self.count("sessions ended")
            self.log(by, f"session {session} is over")
            for host in self.hosts:
                keeper = host.keeper
                if keeper is not None and keeper.alive and keeper.session == session and keeper.holds_now():
                    self.fail("session", f"{by} finds {session} over while its holder holds it")

    def session_held(self, session: SessionId) -> None:
        """A holder considers itself valid right now."""
        if session in self.over_at:
            self.fail("session", f"the holder of {session} considers it valid though it is over")

    def take(self, session: SessionId, bucket: Bucket, knew: Pausing) -> None:
        """*session* becomes the leader: it knew of no pause in force, and may lead unasked or was named.

        *knew*: of the pause, when it sent this. Who does not hear of a pause acts by what it knew last.
        """
        if bucket.pause[1]:
            if knew == bucket.pause:
                self.fail("pause", f"{session} takes the leader key in a pause that it knows of")
            self.count("leader key taken in a pause by who had not heard of it")
        host, before = self.host_of(session), bucket.leader.session
        if before not in (None, session) and (host.has_command or self.host_of(before).has_command):
            self.owed.add(before)
        if host.no_failover:
            leader = bucket.leader
            nominated = Nomination(leader.revision, host.name, "operator") in bucket.named
            if not nominated and (leader.session is not None or leader.successor != host.name):
                self.fail("no_failover", f"{session} leads although nobody has named it")
            self.count("led by a named node without failover")

    def host_of(self, session: SessionId) -> Host:
        """Where it lives."""
        return next(host for host in self.hosts if host.name == session.node)

    def fenced_write(self, epoch: int, key_revision: int, accepted: bool) -> None:
        """G2 at the server: what it accepts is of the present epoch, and epochs never go back."""
        if accepted and (epoch != key_revision or epoch < self.last_fenced):
            self.fail(
                "G2", f"a write of epoch {epoch} was accepted at {key_revision} after {self.last_fenced}"
            )
        if accepted:
            self.last_fenced = epoch
        else:
            self.count("fenced writes refused")
