"""The client: asks every 5 ms, each time on a new connection, and notes who answered when."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import NamedTuple, Self

from phalanx import system

EVERY_SECONDS = 0.005
TIMEOUT_SECONDS = 0.5


class Answer(NamedTuple):
    """One request. ``node``: who answered; empty if nobody did. Times are ``system.now()``."""

    began: float
    ended: float
    node: str


class Outage(NamedTuple):
    """From the last answer before failed requests to the first one after them."""

    began: float
    ended: float
    failed: int

    @property
    def seconds(self) -> float:
        """How long nobody answered."""
        return self.ended - self.began


class Client:
    """Asks *path* of 127.0.0.1:*port* from a thread of its own, from ``with`` to its end."""

    def __init__(self, port: int, path: str = "/node.txt", every_seconds: float = EVERY_SECONDS) -> None:
        self.port, self.every_seconds = port, every_seconds
        self._request = f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode()
        self.answers: list[Answer] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client", daemon=True)

    def _run(self) -> None:
        due = system.now()
        while not self._stop.wait(max(0.0, due - system.now())):
            began = system.now()
            node = self.ask()
            self.answers.append(Answer(began, system.now(), node))
            # After an answer that took long it goes on from now: it does not catch up.
            due = max(due + self.every_seconds, began)

    def ask(self) -> str:
        """One request: the node that answered, empty if none did."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), TIMEOUT_SECONDS) as connection:
                connection.sendall(self._request)
                data = b""
                while chunk := connection.recv(65536):
                    data += chunk
        except OSError:
            return ""
        head, _, body = data.partition(b"\r\n\r\n")
        return body.decode().strip() if b" 200 " in head.split(b"\r\n")[0] else ""

    def is_served(self) -> bool:
        """Whether the last request was answered."""
        return bool(self.answers) and bool(self.answers[-1].node)

    def outages(self, since: float) -> list[Outage]:
        """The outages that had not ended before *since*; one that still lasts ends now."""
        return [one for one in outages(list(self.answers), system.now()) if one.ended >= since]

    def first_answer_of(self, node: str, since: float) -> float | None:
        """When *node* first answered a request that began after *since*."""
        return next((a.ended for a in list(self.answers) if a.began >= since and a.node == node), None)

    def stop(self) -> None:
        """No request from here on."""
        self._stop.set()
        self._thread.join(5)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def outages(answers: list[Answer], now: float) -> list[Outage]:
    """The runs of failed requests among *answers*. One that no answer has ended yet ends *now*."""
    found: list[Outage] = []
    good_at: float | None = None
    failed = 0
    for answer in answers:
        if not answer.node:
            failed += 1
            good_at = answer.began if good_at is None else good_at
            continue
        if failed:
            assert good_at is not None
            found.append(Outage(good_at, answer.ended, failed))
            failed = 0
        good_at = answer.ended
    if failed and good_at is not None:
        found.append(Outage(good_at, now, failed))
    return found
