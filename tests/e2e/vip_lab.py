"""What the tests of virtual addresses share: a lab, holders on its hosts, frames that are heard."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from phalanx.testing.netlab import Host

T = TypeVar("T")

HOLDER = Path(__file__).with_name("vip_holder.py")


def until(condition: Callable[[], T], problem: str, timeout: float = 10.0) -> T:
    """The value of *condition* once it is true."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {timeout:g} s: {problem}"
        time.sleep(0.005)
    return value


class Holding:
    """A holder on a host, see vip_holder.py. ``said`` is all that it has said."""

    def __init__(self, host: Host, declared: object, *, loop: str = "uvloop") -> None:
        self.host = host
        self.process = host.popen(
            [sys.executable, str(HOLDER), json.dumps(declared), loop],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            self.said.append(said)
            if "did" in said:
                self._answers.put(said)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def do(self, command: str, timeout: float = 20.0) -> dict[str, Any]:
        """Have it done: what it says to that."""
        self.tell(command)
        return self.answer(timeout)

    def answer(self, timeout: float = 20.0) -> dict[str, Any]:
        try:
            return self._answers.get(timeout=timeout)
        except queue.Empty:
            raise AssertionError(f"no answer within {timeout} s: {''.join(self.errors)}") from None

    def must(self, command: str) -> dict[str, Any]:
        """Have it done, which has to succeed."""
        did = self.do(command)
        assert not did["error"], did
        return did

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [said for said in self.said if said.get("event") == kind]

    def event(self, kind: str, timeout: float = 10.0) -> dict[str, Any]:
        """Wait for the first event of that kind."""
        return until(lambda: self.events(kind), f"no event {kind}: {self.said} {self.errors}", timeout)[0]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait(10)
        for thread in self._threads:
            thread.join(10)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def lifetime(host: Host, address: str) -> int | None:
    """Whole seconds that an address has left there; None if it is not there, -1 for ever."""
    shown = host.ip("addr", "show", "to", address)
    found = re.search(r"valid_lft (\w+?)(sec)?\s", shown)
    if found is None:
        return None
    return -1 if found[1] == "forever" else int(found[1])


def mac(host: Host) -> str:
    """The hardware address of eth0."""
    found = re.search(r"link/ether (\S+)", host.ip("link", "show", "eth0"))
    assert found is not None
    return found[1]


@contextlib.contextmanager
def listening(host: Host, ethertype: int) -> Generator[list[tuple[float, bytes]]]:
    """All frames of a kind that a host gets meanwhile, with their times."""
    heard: list[tuple[float, bytes]] = []
    raw = host.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype))
    raw.bind(("eth0", ethertype))
    raw.settimeout(0.05)
    stop = threading.Event()

    def hear() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                frame, origin = raw.recvfrom(2048)
                if origin[2] != socket.PACKET_OUTGOING:
                    heard.append((time.monotonic(), frame))

    thread = threading.Thread(target=hear, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        stop.set()
        thread.join(5)
        raw.close()


def send(host: Host, frame: bytes) -> None:
    """Put a frame on the wire."""
    with host.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        raw.bind(("eth0", 0))
        raw.send(frame)
