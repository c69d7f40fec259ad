"""The TCP proxy: passes, delays, resets and swallows, in one direction or both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from phalanx.testing.faults import TcpProxy, Way


@asynccontextmanager
async def echo_behind_proxy() -> AsyncIterator[TcpProxy]:
    """An echo server, reached through a proxy."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1000):
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, TcpProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        yield proxy


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes, seconds: float = 20.0
) -> bytes:
    """The echo of *data*; TimeoutError after *seconds*."""
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), seconds)


async def test_proxy_passes_and_delays() -> None:
    """Bytes come back unchanged; a delay counts once for each direction."""
    async with echo_behind_proxy() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(reader, writer, b"hello") == b"hello"
        proxy.delay(0.05)
        clock = asyncio.get_running_loop().time
        began = clock()
        assert await ask(reader, writer, b"slow") == b"slow"
        assert clock() - began >= 0.099
        writer.close()


async def test_proxy_cut_resets_old_and_new_connections() -> None:
    """A cut link resets what is open and what is newly opened, until it is healed."""
    async with echo_behind_proxy() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(reader, writer, b"x") == b"x"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        reader, new = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        proxy.heal()
        reader, healed = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(reader, healed, b"x") == b"x"
        for each in (writer, new, healed):
            each.close()


@pytest.mark.parametrize("way", list(Way))
async def test_proxy_black_hole_holds_back_until_healed(way: Way) -> None:
    """Nothing arrives and nothing is refused; what was held back arrives after healing."""
    async with echo_behind_proxy() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(reader, writer, b"x") == b"x"
        proxy.black_hole(way)
        with pytest.raises(TimeoutError):
            await ask(reader, writer, b"held", 0.2)
        fresh_reader, fresh = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(TimeoutError):
            await ask(fresh_reader, fresh, b"new", 0.2)
        proxy.heal()
        assert await asyncio.wait_for(reader.readexactly(4), 20) == b"held"
        assert await asyncio.wait_for(fresh_reader.readexactly(3), 20) == b"new"
        writer.close()
        fresh.close()
