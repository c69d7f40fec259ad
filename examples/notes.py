"""A program whose SQLite database survives its node: it writes a row a second on whichever node is active.

Run it on every node: ``phalanx run examples.notes:platform``, or ``python -m examples.notes``.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3

from phalanx import ActiveContext, ActivePassive, Platform, SQLite

platform = Platform("prod", nats="nats://127.0.0.1:4222")
notes = platform.app("notes", ActivePassive(), database=SQLite("notes.db", sync="server"))


@notes.on_active
async def write(ctx: ActiveContext) -> None:
    """``ctx.db.path`` is an ordinary file; what is in it has been there on any node before."""
    with contextlib.closing(sqlite3.connect(ctx.db.path)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS note (number INTEGER PRIMARY KEY, text TEXT)")
        ctx.ready()
        while True:
            with connection:
                row = connection.execute("INSERT INTO note (text) VALUES (?)", (f"from {ctx.node}",))
            position = await ctx.db.sync()  # from here on it survives the loss of any one node
            print(f"note {row.lastrowid} is confirmed at {position}", flush=True)
            await asyncio.sleep(1)


if __name__ == "__main__":
    platform.run()
