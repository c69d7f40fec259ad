"""The client of the database part: writes a row every 20 ms by HTTP, and notes which were acknowledged."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import urllib.parse
from collections.abc import Mapping

from examples.demo.client import Client
from examples.demo.node import NOTES
from phalanx import system
from phalanx.testing.nats import HOST

EVERY_SECONDS = 0.02
TIMEOUT_SECONDS = 3.0
"""A commit is waited for longer than a file: an answer that is not awaited says nothing of the row."""

PROGRAM = "datasette"
_READ_SECONDS = 15.0


class Writer(Client):
    """Rows are numbered from 1. One without an answer is not sent again: it may be there or not."""

    def __init__(self, port: int) -> None:
        super().__init__(port, every_seconds=EVERY_SECONDS)
        self.acknowledged: dict[int, float] = {}
        """When (``system.now()``) the answer to each row came that said that it is committed."""
        self.sent = 0
        self.in_flight = threading.Event()
        """Set while a row was sent and its answer has not come."""
        self._has_table = False

    def ask(self) -> str:
        """Write one row; the program's name if it was acknowledged, else empty."""
        if not self._has_table:
            self._has_table = self._post("setup", {})
            return ""
        self.sent += 1
        number = self.sent
        if not self._post("add", {"n": str(number), "text": f"note {number}"}):
            return ""
        self.acknowledged[number] = system.now()
        return PROGRAM

    def first_answer_of(self, node: str, since: float) -> float | None:
        """When a row sent after *since* was first acknowledged; it does not say by which node."""
        return super().first_answer_of(PROGRAM, since)

    def rows(self) -> set[int]:
        """The numbers of all rows that the program has. Raises OSError."""
        query = urllib.parse.urlencode({"sql": "SELECT n FROM note", "_shape": "arrayfirst"})
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_READ_SECONDS)
        try:
            connection.request("GET", f"/{NOTES}.json?{query}")
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise OSError(f"{answer.status} {body[:200]!r}")
            return set(json.loads(body))
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(f"no list of rows: {error!r}") from error
        finally:
            connection.close()

    def _post(self, query: str, values: Mapping[str, str]) -> bool:
        """Whether one of the queries in datasette.json was carried out, and that was said."""
        body = urllib.parse.urlencode(values)
        request = (
            f"POST /{NOTES}/{query} HTTP/1.0\r\nHost: {HOST}\r\nAccept: application/json\r\n"
            f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        )
        data = b""
        try:
            with socket.create_connection((HOST, self.port), TIMEOUT_SECONDS) as connection:
                connection.sendall(request.encode())
                self.in_flight.set()
                while chunk := connection.recv(65536):
                    data += chunk
        except OSError:
            return False
        finally:
            self.in_flight.clear()
        head, _, answer = data.partition(b"\r\n\r\n")
        try:
            # Half an answer is none.
            return b" 200 " in head.split(b"\r\n")[0] and json.loads(answer).get("ok") is True
        except ValueError:
            return False
