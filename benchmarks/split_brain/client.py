"""``python -m benchmarks.split_brain.client SETTINGS``: asks and writes, and records what it is answered.

It asks the service's address (the virtual one, or where there is none, every host), and every host by its own
address besides: nobody but the active one may answer there either.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from typing import Any

import msgspec

from benchmarks.split_brain.node import PORT
from phalanx import system
from phalanx.testing.history import History

ASK_SECONDS = 0.1
HOSTS_SECONDS = 0.25
WRITE_SECONDS = 0.2
PATIENCE_SECONDS = 1.0
WRITE_PATIENCE_SECONDS = 8.0


class Settings(msgspec.Struct, kw_only=True):
    """*service*: the virtual address; empty: the client looks among the *hosts*."""

    name: str
    history: str
    service: str
    hosts: tuple[str, ...]


class Client:
    """One client, in the host where its process runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._history = History(settings.history)
        self._last_answering = settings.hosts[0]
        self._written = 0

    async def run(self) -> None:
        """Until killed."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._steadily(tasks, ASK_SECONDS, self._ask_service), name="service")
            tasks.create_task(self._steadily(tasks, HOSTS_SECONDS, self._ask_hosts), name="hosts")
            tasks.create_task(self._write(), name="write")

    async def _steadily(self, tasks: asyncio.TaskGroup, seconds: float, ask: Any) -> None:
        """One question every so often, whether the last one was answered or not; each has its deadline."""
        while True:
            tasks.create_task(ask(), name=ask.__name__)
            await asyncio.sleep(seconds * random.uniform(0.8, 1.2))

    async def _ask_service(self) -> None:
        if self._settings.service:
            await self._ask("service", self._settings.service)
            return
        sent = system.now()
        answers = await asyncio.gather(*(self._fetch(host) for host in self._settings.hosts))
        found = [(host, answer) for host, answer in zip(self._settings.hosts, answers, strict=True) if answer]
        for host, answer in found:
            self._note("service", host, sent, answer)
        if not found:
            self._note("service", "", sent, None)

    async def _ask_hosts(self) -> None:
        if self._settings.service:
            await asyncio.gather(*(self._ask("host", host) for host in self._settings.hosts))

    async def _ask(self, way: str, address: str) -> None:
        sent = system.now()
        answer = await self._fetch(address)
        if answer or way == "service":
            self._note(way, address, sent, answer)

    async def _fetch(self, address: str) -> dict[str, Any] | None:
        status, answer = await request(address, "GET", "/", b"", PATIENCE_SECONDS)
        if status == 200:
            self._last_answering = address
            return answer
        return None

    async def _write(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECONDS * random.uniform(0.5, 1.5))
            self._written += 1
            name = f"{self._settings.name}-{self._written}"
            sent = system.now()
            address = self._settings.service or self._last_answering
            status, answer = await request(address, "POST", "/rows", name.encode(), WRITE_PATIENCE_SECONDS)
            if answer is not None:
                self._note("write", address, sent, answer, id=name, confirmed=status == 200)

    def _note(self, way: str, address: str, sent: float, answer: dict[str, Any] | None, **more: Any) -> None:
        """An answer, or that there was none. The event's own time is when it was received."""
        told = {"client": self._settings.name, "way": way, "to": address, "sent": sent, **more}
        if answer is None:
            self._history.record("silence", "", "wiki", 0, **told)
        else:
            node, epoch = answer.pop("node"), answer.pop("epoch")
            self._history.record("answer", node, "wiki", epoch, **told, **answer)


async def request(
    address: str, method: str, path: str, body: bytes, patience: float
) -> tuple[int, dict[str, Any] | None]:
    """Status and JSON of the answer; 0 and None if there is no whole answer in time."""
    writer = None
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection(address, PORT)
            head = f"{method} {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = await reader.read()
            top, _, content = answer.partition(b"\r\n\r\n")
            return int(top.split()[1]), json.loads(content)
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0, None
    finally:
        if writer is not None:
            writer.transport.abort()


def main() -> None:
    """Run it."""
    asyncio.run(Client(msgspec.json.decode(sys.argv[1], type=Settings)).run())


if __name__ == "__main__":
    main()
