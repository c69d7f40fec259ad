"""Litestream's control socket: HTTP/1.1 over a unix socket (server.go of Litestream)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import h11
import msgspec

MAX_ANSWER_BYTES = 1 << 20


class Refused(Exception):
    """Litestream answered, but could not do what it was asked for. The text is its own."""


class Lost(Exception):
    """Litestream does not answer (any more)."""


class ControlSocket:
    """HTTP/1.1 over a unix socket, one request at a time, over one connection that is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._http = h11.Connection(h11.CLIENT)

    async def request(self, method: str, target: str, body: bytes = b"") -> bytes:
        """The body of the answer. Raises Refused (with Litestream's own text), Lost.

        The caller sets the deadline; after a cancellation the next request begins with a new connection.
        """
        whole = False
        try:
            if self._streams is None:
                self._streams = await asyncio.open_unix_connection(str(self.path), limit=MAX_ANSWER_BYTES)
                self._http = h11.Connection(h11.CLIENT)
            status, data = await self._exchange(method, target, body)
            self._http.start_next_cycle()
            whole = True
        except (OSError, h11.ProtocolError, EOFError) as error:
            raise Lost(str(error) or type(error).__name__) from None
        finally:
            if not whole:
                self.close()
        if status != 200:
            raise Refused(_error_text(data) or f"status {status}")
        return data

    async def _exchange(self, method: str, target: str, body: bytes) -> tuple[int, bytes]:
        assert self._streams is not None
        reader, writer = self._streams
        headers = [("Host", "litestream"), ("Content-Length", str(len(body)))]
        head = self._http.send(h11.Request(method=method, target=target, headers=headers))
        end = self._http.send(h11.EndOfMessage()) if not body else self._http.send(h11.Data(data=body))
        if body:
            end = (end or b"") + (self._http.send(h11.EndOfMessage()) or b"")
        writer.write((head or b"") + (end or b""))
        status, data = 0, bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                data += event.data
                if len(data) > MAX_ANSWER_BYTES:
                    raise EOFError("an answer without an end")
            elif isinstance(event, h11.EndOfMessage):
                return status, bytes(data)
            else:
                raise EOFError("the connection was closed")

    def close(self) -> None:
        """Give the connection up. Twice is harmless."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class _Error(msgspec.Struct):
    error: str = ""


def _error_text(data: bytes) -> str:
    try:
        return msgspec.json.decode(data, type=_Error).error
    except msgspec.DecodeError:
        return data.decode(errors="replace")[:300]
