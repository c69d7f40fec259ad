"""What a client on another host sees of a virtual address, and who else claims to have it."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import NamedTuple

from phalanx import system
from phalanx.net import packets
from phalanx.testing import vips
from phalanx.testing.netlab import Host

ASKING = 6
"""Requests under way at a time: one that goes to a dead host holds up no other."""

REQUEST_SECONDS = 0.06
LISTEN_SECONDS = 0.3


class Seen(NamedTuple):
    """An answer: when it was there, and who gave it."""

    at: float
    node: str


class Client:
    """Asks for ``http://address:8080/`` again and again, on new connections, from *host*."""

    def __init__(self, host: Host, address: str) -> None:
        self._host, self._address = host, address
        self._seen: list[Seen] = []
        self._stop = threading.Event()
        self._asking: list[threading.Thread] = []

    def __enter__(self) -> Client:
        for i in range(ASKING):
            thread = threading.Thread(target=self._host.call, args=(self._ask, i), daemon=True)
            thread.start()
            self._asking.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._asking:
            thread.join()

    def _ask(self, number: int) -> None:
        time.sleep(0.002 * number)
        while not self._stop.is_set():
            if (node := who_answers(self._address)) and not self._stop.is_set():
                self._seen.append(Seen(system.now(), node))
            time.sleep(0.002)

    def outage(self, old: str, timeout: float) -> float:
        """Seconds from *old*'s last answer to the first one of another; waits for it. Raises TimeoutError."""
        deadline = system.now() + timeout
        while True:
            seen = list(self._seen)
            news = [each.at for each in seen if each.node != old]
            if news:
                return news[0] - max(each.at for each in seen if each.node == old and each.at < news[0])
            if system.now() > deadline:
                raise TimeoutError(f"nobody but {old} answered within {timeout:g} s")
            time.sleep(0.002)

    def answers_of(self, node: str, since: float) -> int:
        """How often *node* has answered since."""
        return sum(1 for each in self._seen if each.node == node and each.at > since)


def who_answers(address: str) -> str:
    """The node that answers there, empty if nobody does in time. The calling thread is in the client."""
    with contextlib.suppress(OSError), socket.socket() as connection:
        connection.settimeout(REQUEST_SECONDS)
        connection.connect((address, vips.PORT))
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
        return answer.rpartition(b"\r\n")[2].split(b" ")[0].decode()
    return ""


def claimants(host: Host, address: str) -> set[str]:
    """The hardware addresses of all that answer for *address* to *host*."""
    ip, found = ipaddress.IPv4Address(address), set[str]()
    with host.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        raw.bind(("eth0", packets.ETHERTYPE_ARP))
        raw.send(packets.probe(ip, raw.getsockname()[4]))
        deadline = time.monotonic() + LISTEN_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            raw.settimeout(left)
            with contextlib.suppress(TimeoutError):
                claim = packets.claim(raw.recv(256), ip)
                if claim is not None and not claim.asks:
                    found.add(packets.mac_text(claim.mac))
    return found


def program_start_seconds(host: Host, times: int = 5) -> float:
    """How long the program itself takes, from its start until it answers on its own host: the median."""
    return statistics.median(host.call(_one_start) for _ in range(times))


def _one_start() -> float:
    began = system.now()
    with subprocess.Popen([sys.executable, "-I", str(vips.WEB), str(vips.PORT + 1)]) as program:
        try:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", vips.PORT + 1), 1):
                    return system.now() - began
                if system.now() - began > 10:
                    raise TimeoutError("the program does not start")
                time.sleep(0.001)
        finally:
            program.kill()
