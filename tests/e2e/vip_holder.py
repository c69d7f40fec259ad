"""Holds virtual addresses on the host it runs on, as it is told line by line: the addresses of a node alone.

``vip_holder.py ADDRESSES``: their declarations as JSON. Commands: ``check``, ``acquire EPOCH``, ``release``,
``session SECONDS`` (how long it is valid from now on). One JSON object a line comes back for each command
(``did``, ``error``, ``step``, ``seconds``), and for what happens (``event``: registered, unregistered, lost,
problem).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import msgspec

from phalanx.config.reader import Reader
from phalanx.errors import AddressError
from phalanx.net import make_addresses
from phalanx.ports import SectionContext
from phalanx.types import Resource

TTL_SECONDS = 2.0


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


class Holder:
    """The addresses of one app on one host, without the node around them."""

    def __init__(self, declared: object) -> None:
        reader = Reader()
        declarations = reader._vips(declared, "vip")
        assert not reader.errors, reader.errors
        self.addresses = make_addresses("wiki", declarations, TTL_SECONDS)
        self.valid_until: float | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def register(self, resource: Resource) -> None:
        say(event="registered", resource=msgspec.to_builtins(resource))

    def left(self) -> float:
        return TTL_SECONDS * 0.95 if self.valid_until is None else self.valid_until - time.monotonic()

    async def tell_lost(self) -> None:
        error = await self.addresses.lost
        say(event="lost", error=str(error), step=error.step)

    async def do(self, command: str, argument: str) -> None:
        match command:
            case "check":
                await self.addresses.check()
            case "acquire":
                section = SectionContext(
                    "test",
                    "n1",
                    "wiki",
                    int(argument),
                    self.register,
                    lambda resource_id: say(event="unregistered", id=resource_id),
                    session_left_seconds=self.left,
                )
                await self.addresses.acquire(section)
                self.tasks.add(asyncio.create_task(self.tell_lost()))
            case "release":
                await self.addresses.release()
            case "session":
                self.valid_until = time.monotonic() + float(argument)
            case _:
                raise ValueError(command)

    async def run(self) -> None:
        await self.addresses.start(lambda: say(event="problem", text=self.addresses.ineligible_because()))
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        while line := (await reader.readline()).decode().split():
            began = time.monotonic()
            error, step = "", ""
            try:
                await self.do(line[0], line[1] if len(line) > 1 else "")
            except AddressError as failed:
                error, step = str(failed), failed.step
            say(did=line[0], error=error, step=step, seconds=time.monotonic() - began)
        await self.addresses.release()
        await self.addresses.close()


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2] == "uvloop":
        import uvloop

        uvloop.run(Holder(json.loads(sys.argv[1])).run())
    else:
        asyncio.run(Holder(json.loads(sys.argv[1])).run())
