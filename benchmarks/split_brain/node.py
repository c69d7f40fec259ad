"""``python -m benchmarks.split_brain.node``: a node with the program, its database, its address.

What it runs is in the environment: ``LAB_NODE`` holds :class:`Settings` as JSON, the rest is Phalanx's own.
While it is active it offers the database's barrier on a socket, as the program itself knows no Phalanx.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import msgspec

from phalanx import ActiveContext, ActivePassive, Logging, NatsOptions, Platform, Process, SQLite
from phalanx.config import HttpCheck
from phalanx.errors import PhalanxError

PLATFORM, APP = "lab", "wiki"
PORT = 8080
PROGRAM = Path(__file__).with_name("program.py")


class Settings(msgspec.Struct, kw_only=True):
    """What a node runs. ``vip``: address and prefix length of the virtual address; empty: none."""

    urls: tuple[str, ...]
    server_name: str
    folder: str
    vip: str
    ttl: float


def build(settings: Settings) -> Platform:
    """The platform with its one app."""
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    barrier = folder / "barrier"
    platform = Platform(
        PLATFORM,
        nats=NatsOptions(urls=settings.urls, server_name=settings.server_name),
        timings={"ttl": settings.ttl},
        logging=Logging(level="info"),
    )
    database = str(folder / "wiki.db")
    app = platform.app(
        APP,
        ActivePassive(),
        backend=Process(
            (sys.executable, "-S", str(PROGRAM), database, str(PORT), str(barrier)),
            ready=HttpCheck(f"http://127.0.0.1:{PORT}/", interval=0.2),
        ),
        database=SQLite(database, sync="server"),
        vip=settings.vip or None,
        checks=[HttpCheck(f"http://127.0.0.1:{PORT}/", interval=0.5, timeout=1.0, failures=3)],
    )

    @app.on_active
    async def serve(ctx: ActiveContext) -> None:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await ctx.db.sync()
                said = "ok"
            except PhalanxError as error:
                said = f"{type(error).__name__}: {error}".replace("\n", " ")
            with contextlib.suppress(OSError):
                writer.write(f"{said}\n".encode())
                await writer.drain()
                writer.close()

        barrier.unlink(missing_ok=True)
        async with await asyncio.start_unix_server(answer, barrier):
            ctx.ready()
            await asyncio.Event().wait()

    return platform


def main() -> None:
    """Run it."""
    build(msgspec.json.decode(os.environ["LAB_NODE"], type=Settings)).run()


if __name__ == "__main__":
    main()
