"""A node whose handler takes its time, for tests that kill it: ``python -m tests.e2e.events_node FILE``.

A line ``<key> <number>`` goes into FILE when the handling of an event begins.
"""

from __future__ import annotations

import asyncio
import os
import sys

from phalanx import Event, Platform

platform = Platform("test", timings={"ttl": "2s"})
app = platform.app("wiki")
marks = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@app.on_event("step.*", durable="walker")
async def walk(event: Event[int]) -> None:
    """Note it, then work for a moment."""
    os.write(marks, f"{event.key} {event.data}\n".encode())
    await asyncio.sleep(0.01)


if __name__ == "__main__":
    platform.run()
