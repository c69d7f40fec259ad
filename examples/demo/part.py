"""What both parts of the run have in common: start, one fault after the other, and what is seen of each."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import nats

from examples.demo.client import Client
from examples.demo.hosts import Hosts, Line
from examples.demo.node import PLATFORM, STALL_LIMIT_SECONDS, TTL_SECONDS
from examples.demo.programs import Program, Programs, waited_for_cpu
from examples.demo.promises import Fault, Outcome, judge, milliseconds
from examples.demo.timeline import Timeline
from phalanx import system

T = TypeVar("T")

_POLL_SECONDS = 0.05
_START_SECONDS = 60.0
HEAL_SECONDS = 30.0
_TAKEOVER_SECONDS = 15.0
WATCH_SECONDS = 2 * TTL_SECONDS
"""Whoever could be deposed by the loss of a NATS server is by then."""

_OF_APP = (
    r"(leader-acquired|active|handing-over|released|activation-failed|section-failed|killed"
    r"|database-(promoted|returned|diverged|vanished|unavailable)|capture-|replica-lost|log-refused|spool-full)"
)
_OF_NODE = (
    r"node: (session-established|session-lost|no-session|standing-down|suicide)"
    r"|nats: server-(exited|started|adopted)|platform: "
    r"|fenc|killing|stall|ends? the session"
)
"""What of the nodes' logs belongs into the timeline, beside warnings and errors about the rest."""


class Failed(Exception):
    """The demo cannot go on: something that must come did not."""


class Part:
    """Drives the hosts through the faults; *client* and *programs* look on."""

    def __init__(self, hosts: Hosts, client: Client, programs: Programs, timeline: Timeline) -> None:
        self._hosts, self._client, self._programs, self._timeline = hosts, client, programs, timeline
        self._shown = re.compile(rf"app {hosts.app}: {_OF_APP}|{_OF_NODE}")
        self.outcomes: list[Outcome] = []
        self.problems: list[str] = []
        self._overlaps_told = 0
        self._lines: list[Line] = []

    def run(self, faults: Sequence[Fault], first: int, of: int) -> None:
        """All of it; *first*: the number of the first fault, among *of* in all parts. Raises Failed."""
        self._start()
        for number, fault in enumerate(faults, first):
            self._prepare()
            self._tell_lines()
            self._timeline.title(f"{number}/{of}  {fault.title}")
            self._play(fault)
        self._finish()

    # --- what differs

    def _introduce(self) -> None:
        raise NotImplementedError

    def _prepare(self) -> None:
        """Before each fault."""

    def _play(self, fault: Fault) -> None:
        """Inflict it, note and tell the outcome, heal."""
        raise NotImplementedError

    def _cause(self, fault: Fault, active: str) -> float:
        """Do it. When, by ``system.now()``."""
        raise NotImplementedError

    def _await_moment(self) -> None:
        """Return when it hurts most."""

    @property
    def requests(self) -> int:
        """How many the client has sent."""
        return len(self._client.answers)

    def fail(self, problem: str) -> None:
        """It could not go on: *problem*, and what was seen until then."""
        self.problems += [problem, *self._new_overlaps()]

    # --- start, and between faults

    def _start(self) -> None:
        say = self._say
        names = ", ".join(host.name for host in self._hosts)
        say("demo", f"starting {names}: each a node, its keeper and its NATS server, on 127.0.0.1")
        say("demo", "their three NATS servers form a cluster first, which takes them 2 to 10 s")
        self._introduce()
        say(
            "demo",
            f"TTL {TTL_SECONDS:g} s (default 5 s), stall limit {STALL_LIMIT_SECONDS:g} s (default 2 s)",
        )
        self._hosts.start()
        self._wait(lambda: not self._hosts.problem(), self._hosts.problem, _START_SECONDS)
        self._wait(self._client.is_served, lambda: "the client is not served", _TAKEOVER_SECONDS)
        node, epoch = self._hosts.active()
        say("demo", f"all is healthy: {node} is active (epoch {epoch}), the others are standbys")

    def _heal(self) -> None:
        for host in self._hosts:
            if not host.node.is_running:
                self._say("demo", f"starts {host.name} again, as a service manager would")
        self._hosts.start()
        self._wait(lambda: not self._hosts.problem(), self._hosts.problem, HEAL_SECONDS)
        node, epoch = self._hosts.active()
        self._say("demo", f"healthy again: {node} is active (epoch {epoch}), two standbys")

    def _finish(self) -> None:
        node, epoch = self._hosts.active()
        if not node:
            self.problems.append("at the end no node is active")
        running = self._programs.running()
        if [program.epoch for program in running] != [epoch]:
            shown = ", ".join(f"{p.node} (epoch {p.epoch})" for p in running) or "none"
            self.problems.append(
                f"at the end exactly one program should run, of epoch {epoch}; found: {shown}"
            )
        if not self._client.is_served():
            self.problems.append("at the end the client is not served")
        epochs = [program.epoch for program in self._programs.all]
        if epochs != sorted(epochs):
            self.problems.append(f"programs were started under epochs that did not only grow: {epochs}")
        self.problems += self._new_overlaps()

    # --- one fault

    def _inflict(self, fault: Fault) -> Outcome:
        before, epoch = self._hosts.active()
        if not before:
            raise Failed("no node is active")
        program = self._programs.last_of(epoch)
        if program is None:
            raise Failed(f"no program of epoch {epoch} was seen")
        waited = waited_for_cpu()
        began = self._cause(fault, before)
        if fault.bound_seconds is None:
            outcome = self._unmoved(fault, before, program, began)
        else:
            outcome = self._moved(fault, before, program, began, waited)
        return judge(outcome, tuple(self._new_overlaps()))

    def _kill(self, active: str) -> float:
        node = self._hosts[active].node
        self._say("demo", f"kill -KILL {node.pid}: the process of {active}, which is active")
        self._await_moment()
        began = system.now()
        node.kill()
        return began

    def _hand_over(self, active: str) -> float:
        self._say("demo", f"asks {active}, which is active, to step down")
        url = f"nats://127.0.0.1:{self._hosts[active].settings.nats_port}"
        began, reply = asyncio.run(_step_down(url, self._hosts.app))
        self._say(active, f"answers: {reply}")
        return began

    # --- what came of it

    def _moved(self, fault: Fault, before: str, old: Program, began: float, waited: float) -> Outcome:
        new = self._wait_for(
            lambda: self._programs.of_epoch_after(old.epoch),
            lambda: f"{before} is gone, nobody else has started the program yet",
            _TAKEOVER_SECONDS,
        )
        waited = waited_for_cpu() - waited
        answered = self._wait_for(
            lambda: self._client.first_answer_of(new.node, new.seen),
            lambda: f"{new.node} has started the program, it does not answer yet",
            _TAKEOVER_SECONDS,
        )
        self._tell_lines()
        after, epoch = self._wait_for(
            lambda: found if (found := self._hosts.active())[0] else None,
            lambda: "no node says that it is active",
            _TAKEOVER_SECONDS,
        )
        since = began
        if fault.since != "fault" and old.ended is not None:
            since = max(began, old.ended)
        outages = self._client.outages(began)
        longest = max(outages, key=lambda outage: outage.seconds, default=None)
        outcome = Outcome(
            fault=fault.key,
            before=before,
            epoch_before=old.epoch,
            after=after,
            epoch_after=epoch,
            ended=self._how_ended(fault, old, began),
            takeover=new.seen - since,
            program_stop=since - began,
            waited_for_cpu=waited,
            program_start=answered - new.seen,
            outage=longest.seconds if longest else 0.0,
            failed_requests=sum(outage.failed for outage in outages),
        )
        self._tell_moved(outcome, old, new, began, answered)
        return outcome

    def _tell_moved(self, o: Outcome, old: Program, new: Program, began: float, answered: float) -> None:
        say = self._say
        if old.ended is not None:
            after = milliseconds(max(0.0, old.ended - began))
            say("demo", f"the program of {o.before} (epoch {old.epoch}) ended after {after}, {o.ended}")
        say(
            "demo",
            f"{new.node} took over: its program (epoch {new.epoch}) was started "
            f"{milliseconds(new.seen - began)} after the fault",
        )
        say(
            "client",
            f"served by {new.node}: outage {milliseconds(o.outage)}, {o.failed_requests} requests failed "
            f"({milliseconds(answered - new.seen)} of it is the program's own start)",
        )

    def _unmoved(self, fault: Fault, before: str, old: Program, began: float) -> Outcome:
        self._wait(
            lambda: system.now() >= began + WATCH_SECONDS,
            lambda: f"watching for {WATCH_SECONDS:g} s whether anything moves",
            WATCH_SECONDS + 5,
        )
        after, epoch = self._hosts.active()
        outages = self._client.outages(began)
        if self._programs.of_epoch_after(old.epoch) is None and old.ended is None:
            self._say("demo", f"{before} went on, its program (epoch {old.epoch}) too")
        served = len([a for a in self._client.answers if a.began >= began])
        self._say("client", f"{served} requests since, {sum(o.failed for o in outages)} failed")
        return Outcome(
            fault=fault.key,
            before=before,
            epoch_before=old.epoch,
            after=after,
            epoch_after=epoch,
            ended=self._how_ended(fault, old, began),
            outage=max((outage.seconds for outage in outages), default=0.0),
            failed_requests=sum(outage.failed for outage in outages),
        )

    def _how_ended(self, fault: Fault, old: Program, began: float) -> str:
        """By the logs of those who ended it. A host that dies as a whole tells nothing."""
        if old.ended is None:
            return "goes on" if fault.bound_seconds is None else "still runs"
        if fault.key in ("host", "db-power"):
            return "died with its host"
        began_wall = system.wall() - (system.now() - began) - 0.001
        for line in self._lines:
            if line.who == f"{old.node} keeper" and "fencing" in line.text and line.at >= began_wall:
                return "killed with its node"  # by the keeper, or by the kernel for it
            if line.who == old.node and (
                found := re.search(rf"process {old.pid} (exited|killed) .+", line.text)
            ):
                return found[0].partition(f"{old.pid} ")[2]
        return "nobody can tell"

    def _misplaced(self) -> str:
        """The app's stream should not be led on the host of its active node; the platform sees to that."""
        leads = [host.name for host in self._hosts if host.leads_stream()]
        active, _ = self._hosts.active()
        if not leads:
            return "no NATS server leads the app's stream"
        return f"the app's stream is led on the host of the active node, {active}" if active in leads else ""

    def _new_overlaps(self) -> list[str]:
        fresh = self._programs.overlaps[self._overlaps_told :]
        self._overlaps_told += len(fresh)
        return [f"{overlap} (G1)" for overlap in fresh]

    # --- waiting, and telling meanwhile

    def _wait(self, condition: Callable[[], bool], waiting_for: Callable[[], str], seconds: float) -> None:
        self._wait_for(lambda: condition() or None, waiting_for, seconds)

    def _wait_for(
        self, condition: Callable[[], T | None], waiting_for: Callable[[], str], seconds: float
    ) -> T:
        """The first value of *condition* that is one. Raises Failed after *seconds*."""
        deadline = system.now() + seconds
        while True:
            self._tell_lines()
            value = condition()
            if value is not None:
                self._timeline.close()
                return value
            problem = waiting_for()
            if system.now() > deadline:
                raise Failed(f"after {seconds:g} s: {problem or 'it did not come'}")
            if problem:
                self._timeline.progress(problem)
            time.sleep(_POLL_SECONDS)

    def _tell_lines(self) -> None:
        lines = [line for host in self._hosts for line in host.new_lines()]
        self._lines += lines
        for line in sorted(lines, key=lambda line: line.at):
            if self._shown.search(line.text):
                self._timeline.say(line.who, _short(line, self._hosts.app), wall=line.at)

    def _say(self, who: str, text: str, *, at: float | None = None) -> None:
        self._tell_lines()  # what the nodes have said before
        self._timeline.say(who, text, at=at)


def _short(line: Line, app: str) -> str:
    text = line.text if len(line.text) <= 130 else f"{line.text[:129]}…"
    return text.removeprefix(f"app {app}: ")


async def _step_down(url: str, app: str) -> tuple[float, str]:
    """Ask the active node, as ``phalanx stepdown`` does. When it was asked, and what it answered."""
    client = await nats.connect(url)  # pyright: ignore[reportUnknownMemberType] - its **options
    try:
        began = system.now()
        answer = await client.request(
            f"{PLATFORM}._.control.app.{app}.stepdown", b'{"by":"the demo"}', timeout=10
        )
    finally:
        await client.close()
    reply = msgspec.json.decode(answer.data)
    return began, reply.get("error") or f"{reply['node']} has handed over to {reply.get('successor')}"
