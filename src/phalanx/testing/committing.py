"""Commits rows to an app's database while the test program is active, and notes what was committed.

One transaction is one row of ``entries`` with the next number. Rows go on counting where the last reign's
ended: so a lost one leaves a number that is written anew, under a later epoch.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3

from phalanx import ActiveContext, system
from phalanx.testing.history import History

CALM_SECONDS, STORM_SECONDS = 3.0, 1.5
"""With storms: how long there are some commits a second, and then hundreds."""

STORM_COMMITS = 8
"""Commits in a row in a storm, without a look at anything else; then there is a short pause."""

STORM_PAUSE_SECONDS = 0.015
BARRIER_PAUSE_SECONDS = 0.1
AGAIN_SECONDS = 0.2
CELL_BYTES = 8000
LARGE_CELLS = 160
"""Large transactions have that many cells, at most: 1.3 MB, more than a message can hold."""

HUGE_CELLS = 2500
"""More than the 4096 pages from which on a replica is made anew; now and then."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, epoch INTEGER, node TEXT, text TEXT)",
    # What a large transaction has besides its row; ``cells`` says how many there are of that number.
    "CREATE TABLE IF NOT EXISTS cells (number INTEGER, place INTEGER, cells INTEGER, data BLOB)",
)


def text_of(number: int) -> str:
    """What the row with that number holds."""
    return f"{number}:" + "x" * (number % 200)


class Committer:
    """Of one active section. *storms*: several commits a second and hundreds take turns, VACUUMs and large
    transactions among them, and barriers are asked for beside the commits; else there is a commit every
    *commit_seconds*, and a barrier after every *sync_every* (0: none). While *stop_file* exists nothing is
    committed: what was is then confirmed, and noted as ``rested``."""

    def __init__(
        self,
        history: History,
        app: str,
        ctx: ActiveContext,
        *,
        commit_seconds: float,
        sync_every: int,
        storms: bool = False,
        stop_file: str = "",
    ) -> None:
        self._history, self._app, self._ctx = history, app, ctx
        self._commit_seconds, self._sync_every = commit_seconds, sync_every
        self._storms, self._stop_file = storms, stop_file
        self._random = random.Random(ctx.epoch)
        self._number = 0

    async def run(self) -> None:
        """Commit until cancelled; where SQLite refuses, note it and begin anew."""
        while True:
            try:
                await self._run()
            except sqlite3.Error as error:
                self._note("commit-failed", self._number, error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(AGAIN_SECONDS)

    async def _run(self) -> None:
        connection = sqlite3.connect(self._ctx.db.path, isolation_level=None, timeout=10)
        barriers = None
        try:
            self._open(connection)
            if self._storms:
                barriers = asyncio.create_task(self._barriers(), name=f"{self._app} barriers")
                await self._take_turns(connection)
            else:
                await self._steadily(connection)
        finally:
            if barriers is not None:
                barriers.cancel()
                await asyncio.gather(barriers, return_exceptions=True)
            connection.close()

    def _note(self, kind: str, number: int, **data: object) -> None:
        self._history.record(kind, self._ctx.node, self._app, self._ctx.epoch, number=number, **data)

    def _open(self, connection: sqlite3.Connection) -> None:
        # A kill within a commit leaves something else behind in each of the two (see data.committed).
        connection.execute(f"PRAGMA synchronous = {('NORMAL', 'FULL')[self._ctx.epoch % 2]}")
        connection.execute("PRAGMA journal_mode = WAL")
        for statement in _TABLES:
            connection.execute(statement)
        self._number = connection.execute("SELECT coalesce(max(number), 0) FROM entries").fetchone()[0]
        self._note("opened", self._number)

    # --- in which rhythm

    async def _steadily(self, connection: sqlite3.Connection) -> None:
        while True:
            await self._rest()
            self._commit(connection)
            if self._sync_every and self._number % self._sync_every == 0:
                await self._barrier(self._number)
            await asyncio.sleep(self._commit_seconds)

    async def _take_turns(self, connection: sqlite3.Connection) -> None:
        # The first phase is cut short by chance: reigns that are over soon must not all be calm.
        began = system.now() - self._random.uniform(0, CALM_SECONDS)
        while True:
            await self._rest()
            elapsed = (system.now() - began) % (CALM_SECONDS + STORM_SECONDS)
            if elapsed < CALM_SECONDS:
                self._commit(connection)
                await asyncio.sleep(self._commit_seconds)
                continue
            for _ in range(STORM_COMMITS):
                self._commit(connection)
            await asyncio.sleep(STORM_PAUSE_SECONDS)
            if self._random.random() < 0.03:
                self._something_large(connection)
                await asyncio.sleep(STORM_PAUSE_SECONDS)

    def _something_large(self, connection: sqlite3.Connection) -> None:
        chance = self._random.random()
        if chance < 0.3:
            connection.execute("VACUUM")
            self._note("vacuumed", self._number)
        else:
            self._commit(connection, HUGE_CELLS if chance > 0.98 else self._random.randint(10, LARGE_CELLS))

    async def _rest(self) -> None:
        """While there is the stop file: confirm what was committed, then wait."""
        rested = False
        while self._stop_file and os.path.exists(self._stop_file):  # noqa: ASYNC240 - a look at one file
            if not rested and await self._barrier(self._number):
                rested = True
                self._note("rested", self._number)
            await asyncio.sleep(0.05)

    # --- commits and barriers

    def _commit(self, connection: sqlite3.Connection, cells: int = 0) -> None:
        """One transaction: a row, and *cells* besides that replace those of earlier ones."""
        number = self._number + 1
        row = (number, self._ctx.epoch, self._ctx.node, text_of(number))
        insert = "INSERT INTO entries VALUES (?, ?, ?, ?)"
        if cells:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("DELETE FROM cells")
            connection.executemany(
                "INSERT INTO cells VALUES (?, ?, ?, randomblob(?))",
                ((number, place, cells, CELL_BYTES) for place in range(cells)),
            )
            connection.execute(insert, row)
            connection.execute("COMMIT")
        else:
            connection.execute(insert, row)
        self._number = number
        self._note("committed", number)

    async def _barriers(self) -> None:
        while True:
            await self._barrier(self._number)
            await asyncio.sleep(BARRIER_PAUSE_SECONDS)

    async def _barrier(self, number: int) -> bool:
        """Ask for a barrier after the row *number* was committed; whether it was confirmed."""
        try:
            position = await self._ctx.db.sync()
        except Exception as error:
            self._note("sync-failed", number, error=f"{type(error).__name__}: {error}")
            return False
        self._note("confirmed", number, sequence=position.sequence)
        return True
