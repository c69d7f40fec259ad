"""Faults to inflict in tests: signals to processes, and a TCP link that can be slowed or cut.

A node is cut off from NATS by giving it the proxy's address::

    async with TcpProxy("127.0.0.1", nats.port(0)) as link:
        ...                      # node connects to link.url
        link.black_hole()        # the cable is pulled: nothing arrives, nothing is refused
        link.heal()              # what was held back arrives, as TCP's retransmissions would
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
from enum import Enum
from types import TracebackType
from typing import Self

_CHUNK = 65536
_HELD_CHUNKS = 64


def freeze(pid: int) -> None:
    """SIGSTOP: the process stands still, its connections stay open."""
    os.kill(pid, signal.SIGSTOP)


def thaw(pid: int) -> None:
    """SIGCONT; a process that was killed meanwhile is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def kill(pid: int) -> None:
    """SIGKILL; a process that is gone already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Way(Enum):
    """Which way a fault applies. UP: from the client to the server."""

    UP = "up"
    DOWN = "down"
    BOTH = "both"


class _Direction:
    """What happens to one direction of all connections. ``flows`` is clear while nothing passes."""

    def __init__(self) -> None:
        self.delay_seconds = 0.0
        self.flows = asyncio.Event()
        self.flows.set()


class TcpProxy:
    """A TCP link from 127.0.0.1:``port`` to *host*:*port*. Faults hold until ``heal()``.

    Use it inside one event loop, as ``async with`` or with ``start()`` and ``stop()``.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._transports: set[asyncio.WriteTransport] = set()
        self._refuse = False
        self._up, self._down = _Direction(), _Direction()
        self.port = 0

    @property
    def url(self) -> str:
        """The proxy's own address, as a NATS URL."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many clients are connected (black-holed ones count)."""
        return len(self._links)

    # --- faults

    def heal(self) -> None:
        """Everything passes again, without delay. Connections that were cut stay cut."""
        self._refuse = False
        for direction in (self._up, self._down):
            direction.delay_seconds = 0.0
            direction.flows.set()

    def delay(self, seconds: float, way: Way = Way.BOTH) -> None:
        """Everything passes, *seconds* later in each chosen direction. Throughput is not limited."""
        for direction in self._ways(way):
            direction.delay_seconds = seconds

    def cut(self) -> None:
        """Reset (RST) all connections, and each new one at once."""
        self._refuse = True
        self.reset()

    def reset(self) -> None:
        """Reset (RST) all present connections; new ones pass."""
        for transport in list(self._transports):
            _reset(transport)

    def black_hole(self, way: Way = Way.BOTH) -> None:
        """Nothing arrives any more, not even a close; new connections are accepted and hang."""
        for direction in self._ways(way):
            direction.flows.clear()

    def _ways(self, way: Way) -> list[_Direction]:
        return [d for d, other in ((self._up, Way.DOWN), (self._down, Way.UP)) if way is not other]

    # --- connections

    async def start(self) -> None:
        """Listen on a free port. ``port`` and ``url`` are valid from then on."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Reset all connections and stop listening."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset()
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuse:
            _reset(writer.transport)
            return
        link = asyncio.ensure_future(self._serve(reader, writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transports: list[asyncio.WriteTransport] = [writer.transport]
        self._transports.update(transports)
        try:
            await self._up.flows.wait()
            server_reader, server_writer = await asyncio.open_connection(*self._target)
            transports.append(server_writer.transport)
            self._transports.update(transports)
            async with asyncio.TaskGroup() as both:
                both.create_task(_carry(reader, server_writer, self._up))
                both.create_task(_carry(server_reader, writer, self._down))
        except* OSError:
            pass  # One side is gone or refuses: the other one learns it by the reset below.
        finally:
            for transport in transports:
                _reset(transport)
            self._transports.difference_update(transports)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: _Direction) -> None:
    """Bytes of one direction, each chunk due at its arrival + delay, in order, then the end of file."""
    due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_HELD_CHUNKS)
    async with asyncio.TaskGroup() as both:
        both.create_task(_receive(reader, due, direction))
        both.create_task(_deliver(writer, due, direction))


async def _receive(
    reader: asyncio.StreamReader, due: asyncio.Queue[tuple[float, bytes]], direction: _Direction
) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        data = await reader.read(_CHUNK)
        await due.put((clock() + direction.delay_seconds, data))
        if not data:
            return


async def _deliver(
    writer: asyncio.StreamWriter, due: asyncio.Queue[tuple[float, bytes]], direction: _Direction
) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        when, data = await due.get()
        if (left := when - clock()) > 0:
            await asyncio.sleep(left)
        await direction.flows.wait()
        if not data:
            writer.write_eof()
            return
        writer.write(data)
        await writer.drain()


def _reset(transport: asyncio.WriteTransport) -> None:
    """Close with RST: a linger time of zero drops what is unsent and sends no FIN."""
    if transport.is_closing():
        return
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
