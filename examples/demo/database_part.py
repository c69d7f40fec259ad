"""The second part: a program with a SQLite database, a client that writes, and what is left of the rows."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from examples.demo.hosts import Hosts
from examples.demo.ledger import Ledger, Rows, SetAside, shown
from examples.demo.node import CONFIRMED, PLATFORM
from examples.demo.part import HEAL_SECONDS, Failed, Part
from examples.demo.programs import Programs
from examples.demo.promises import Fault, judge_rows
from examples.demo.timeline import Timeline
from examples.demo.writer import EVERY_SECONDS, Writer
from phalanx import system
from phalanx.client import PlatformClient
from phalanx.client_db import Verification
from phalanx.config import NatsOptions
from phalanx.errors import PhalanxError

T = TypeVar("T")

_CONFIRMED = re.compile(rf"{CONFIRMED} before ([\d.]+) in epoch (\d+)")
_RETURNED, _DIVERGED = "database-returned", "database-diverged"
_AUDIT_SECONDS = 15.0
_READ_SECONDS = 10.0
_IN_FLIGHT_SECONDS = 5.0
_WARM_ROWS = 25
"""So many rows at least are written between two faults."""
_MAY_LOSE = ("db-kill", "db-power")


class DatabasePart(Part):
    """Three nodes, one of which runs Datasette on its database."""

    def __init__(self, hosts: Hosts, client: Writer, programs: Programs, timeline: Timeline) -> None:
        super().__init__(hosts, client, programs, timeline)
        self._writer = client
        self._ledger = Ledger()
        self._began = 0.0

    def _start(self) -> None:
        self._timeline.title("A program with a database, on three hosts anew")
        super()._start()

    def _introduce(self) -> None:
        app, port = self._hosts.app, self._client.port
        self._say("demo", f"app {app!r}, active-passive, with a SQLite database on each host")
        self._say("demo", f"its program: Datasette, on port {port}; it knows nothing of Phalanx")
        self._say("client", f"sends a row every {1000 * EVERY_SECONDS:g} ms, notes which are acknowledged")

    def _prepare(self) -> None:
        self._wait(lambda: not self._misplaced(), self._misplaced, HEAL_SECONDS)
        goal = len(self._writer.acknowledged) + _WARM_ROWS
        self._wait(
            lambda: len(self._writer.acknowledged) >= goal and self._confirmed_since(system.now() - 0.5),
            lambda: "rows are written, barriers confirm them",
            HEAL_SECONDS,
        )

    # --- faults

    def _play(self, fault: Fault) -> None:
        outcome = self._inflict(fault)
        wall = system.wall() - (system.now() - self._began)
        self._heal()
        rows = self._account(fault, outcome.before, outcome.epoch_before, wall)
        outcome = judge_rows(outcome, rows)
        self._say(
            "client",
            f"rows acknowledged since the fault before: {rows.acknowledged}, confirmed by a barrier: "
            f"{rows.confirmed}, lost: {rows.lost}",
        )
        self.outcomes.append(outcome)
        self._timeline.outcome(outcome)

    def _cause(self, fault: Fault, active: str) -> float:
        self._began = {
            "db-litestream": self._kill_litestream,
            "db-handover": self._hand_over,
            "db-kill": self._kill,
            "db-power": self._lose_power,
        }[fault.key](active)
        return self._began

    def _kill_litestream(self, active: str) -> float:
        pids = self._wait_for(
            lambda: self._hosts[active].helpers("litestream") or None,
            lambda: f"{active} has no Litestream",
            _READ_SECONDS,
        )
        self._say("demo", f"kill -KILL {pids[0]}: Litestream of {active}, in the middle of a write")
        self._await_moment()
        began = system.now()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return began

    def _lose_power(self, active: str) -> float:
        host = self._hosts[active]
        programs = [program.pid for program in self._programs.running() if program.node == active]
        victims = [*host.helpers(), *programs]
        self._say("demo", f"kills all of {active} at once: node, keeper, Litestream, program, NATS server")
        self._await_moment()
        began = system.now()
        host.die(victims)
        return began

    def _await_moment(self) -> None:
        """Return in the middle of a write: the row was sent, its answer has not come."""
        self._writer.in_flight.wait(_IN_FLIGHT_SECONDS)

    # --- what came of the rows

    def _account(self, fault: Fault, node: str, epoch: int, since: float) -> Rows:
        may_lose = fault.key in _MAY_LOSE
        set_aside = None
        if may_lose:
            set_aside = self._wait_for(
                lambda: self._said_by(node, epoch, since),
                lambda: f"{node} is back and has not yet said what it had beyond the log",
                _AUDIT_SECONDS,
            )
            if set_aside.file:
                name, count = Path(set_aside.file).name, set_aside.transactions
                self._say("demo", f"{node} keeps in {name} what the log lacked; transactions: {count}")
        acknowledged = dict(self._writer.acknowledged)
        old = self._programs.last_of(epoch)
        return self._ledger.account(
            acknowledged,
            self._present(),
            confirmed_before=self._confirmed_in(epoch),
            until=old.ended if old is not None and old.ended is not None else self._began,
            may_lose=may_lose,
            set_aside=set_aside,
        )

    def _said_by(self, node: str, epoch: int, since: float) -> SetAside | None:
        """The entry of the audit log that says what *node* had, once it is there."""
        try:
            entries = self._ask(lambda client: client.audit(since))
        except PhalanxError:
            return None
        for entry in entries:
            if entry.node != node or entry.action not in (_RETURNED, _DIVERGED) or entry.epoch != epoch:
                continue
            details: dict[str, str] = entry.details
            file = details.get("file", "")
            return SetAside(
                node,
                epoch,
                int(details["transactions"]),
                details.get("exact", "true") == "true",
                file,
                _rows_in(file) if file else frozenset(),
            )
        return None

    def _present(self) -> frozenset[int]:
        def read() -> frozenset[int] | None:
            try:
                return frozenset(self._writer.rows())
            except OSError:
                return None

        return self._wait_for(read, lambda: "the program does not list its rows", _READ_SECONDS)

    def _confirmed_in(self, epoch: int) -> float:
        """Until when (``system.now()``) barriers of that reign have confirmed commits; 0: never."""
        found = (_CONFIRMED.search(line.text) for line in self._lines)
        return max((float(each[1]) for each in found if each and int(each[2]) == epoch), default=0.0)

    def _confirmed_since(self, moment: float) -> bool:
        return self._confirmed_in(self._hosts.active()[1]) > moment

    # --- the end

    def _finish(self) -> None:
        super()._finish()
        self._writer.stop()
        acknowledged, present = set(self._writer.acknowledged), self._present()
        if gone := acknowledged - present - self._ledger.lost:
            self.problems.append(f"at the end rows are gone that no fault has taken: {shown(gone)}")
        found = self._verify()
        self.problems += found.problems
        prints = {node.fingerprint for node in found.nodes}
        names = ", ".join(node.node for node in found.nodes)
        if len(found.compared) != len(list(self._hosts)) or len(prints) != 1:
            shown_prints = ", ".join(f"{n.node} {n.fingerprint[:12]} at {n.position}" for n in found.nodes)
            self.problems.append(f"the databases are not all equal at the end: {shown_prints}")
        else:
            self._say(
                "demo",
                f"databases of {names} are sound and equal: fingerprint {prints.pop()[:16]} at "
                f"{found.nodes[0].position}",
            )
        lost = len(acknowledged - present)
        self._say("client", f"{len(acknowledged):,} rows acknowledged in all; not there any more: {lost}")

    def _verify(self) -> Verification:
        def all_three() -> Verification | None:
            try:
                found = self._ask(lambda client: client.databases.verify(self._hosts.app, timeout=20.0))
            except PhalanxError:
                return None
            return found if len(found.nodes) == len(list(self._hosts)) else None

        return self._wait_for(all_three, lambda: "each node reads its whole database", HEAL_SECONDS)

    def _ask(self, question: Callable[[PlatformClient], Coroutine[Any, Any, T]]) -> T:
        async def ask() -> T:
            options = NatsOptions(urls=self._hosts.urls())
            async with PlatformClient(PLATFORM, options) as client:
                return await question(client)

        return asyncio.run(ask())


def _rows_in(file: str) -> frozenset[int]:
    try:
        connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
        try:
            return frozenset(n for (n,) in connection.execute("SELECT n FROM note"))
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise Failed(f"{file} cannot be read: {error}") from error
