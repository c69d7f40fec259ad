"""A node that starts a program, to be killed: ``python -m tests.conformance.node STAGE FOLDER BEHAVIOUR AT``.

It prints each resource that it registers, and ``now`` when it is to be killed; see ``Stage.node_dies``.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from phalanx.ports import SectionContext
from phalanx.testing.fake_backend import Behaviour
from phalanx.types import Resource

from .stages import BACKENDS


async def main(name: str, folder: str, behaviour: str, at: int) -> None:
    """Start it, say so, and wait for the end."""
    stage = BACKENDS[name](Path(folder))
    number = 0

    async def register(resource: Resource) -> None:
        nonlocal number
        number += 1
        sys.stdout.write(msgspec.json.encode(resource).decode() + "\n")
        if number == at:
            await wait()
        sys.stdout.flush()

    async def wait() -> None:
        sys.stdout.write("now\n")
        sys.stdout.flush()
        await asyncio.sleep(600)

    section = SectionContext("prod", "n1", stage.app, 6, register, lambda resource_id: None)
    await stage.backend(msgspec.json.decode(behaviour, type=Behaviour)).start(section)
    while not stage.has_said("started"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
