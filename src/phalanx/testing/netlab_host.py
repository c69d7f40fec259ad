"""One host of a ``NetLab``: a network namespace, its programs, and functions that run inside of it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from phalanx.testing import namespaces

_THREADS_PER_HOST = 16

P = ParamSpec("P")
T = TypeVar("T")


class Host:
    """One host of a lab. Programs run in it by ``popen`` and ``run``, functions by ``call``.

    *index* is counted from 0, the *name* from h1. *address6* is empty where there is no IPv6.
    """

    def __init__(self, index: int, name: str, namespace: str, address: str, address6: str) -> None:
        self.index, self.name, self.namespace = index, name, namespace
        self.address, self.address6 = address, address6
        self.executor = ThreadPoolExecutor(
            _THREADS_PER_HOST, self.name, lambda: namespaces.enter(self.namespace)
        )
        """Its threads are inside this host: what they connect and listen to is."""
        self._processes: list[subprocess.Popen[Any]] = []

    # --- programs

    def command(self, *command: str) -> list[str]:
        """*command*, as it has to be started from outside to run in this host. The process id stays the same.

        Only the network is the host's: ``/sys/class/net`` still shows the machine's interfaces.
        """
        return namespaces.command(self.namespace, *command)

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen`` inside this host, with its *options*; killed with the lab at the latest."""
        process: subprocess.Popen[Any] = subprocess.Popen(self.command(*command), **options)
        self._processes.append(process)
        return process

    def run(
        self,
        command: Sequence[str],
        *,
        timeout: float = 30.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end. With *check*, NetLabError with its output when it fails."""
        return namespaces.run(self.command(*command), timeout=timeout, check=check, env=env)

    def ip(self, *arguments: str) -> str:
        """``ip`` inside this host: its output. Raises NetLabError."""
        return namespaces.ip(self.namespace, *arguments)

    def addresses(self, interface: str = "eth0") -> list[str]:
        """The addresses of an interface, without their prefix lengths, link-local ones left out."""
        shown = self.ip("-o", "addr", "show", "dev", interface, "scope", "global")
        return re.findall(r"inet6? ([0-9a-f:.]+)", shown)

    def pids(self) -> list[int]:
        """Every process that runs in this host, however it came there."""
        return namespaces.pids(self.namespace)

    # --- functions and sockets

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run *function* in a thread of this host; wait for what it returns.

        Sockets belong to the thread that makes them, so a whole client may live there:
        ``host.call(asyncio.run, main())``.
        """
        return self.executor.submit(function, *args, **kwargs).result()

    async def acall(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``call``, for asyncio. Cancelled, it leaves the function running: give it a deadline."""
        return await asyncio.wrap_future(self.executor.submit(function, *args, **kwargs))

    def socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """A socket of this host, to be used anywhere: ``await loop.sock_connect(host.socket(), (…))``."""
        return self.call(socket.socket, family, kind, protocol)

    def get(self, address: str, port: int, path: str, timeout: float = 0.5) -> tuple[int, bytes]:
        """HTTP GET from this host: status and body; status 0 when there is no whole answer in time."""
        return self.call(http_get, address, port, path, timeout)

    async def aget(self, address: str, port: int, path: str, timeout: float = 0.5) -> tuple[int, bytes]:
        """``get``, for asyncio."""
        return await self.acall(http_get, address, port, path, timeout)

    def reaches(self, other: Host, *, timeout: float = 0.3) -> bool:
        """Whether a packet (UDP) gets from this host to *other* and its answer back."""
        return self.call(_sent, other, timeout, echo=True)

    def delivers(self, other: Host, *, timeout: float = 0.3) -> bool:
        """Whether a packet (UDP) gets from this host to *other*, one way."""
        return self.call(_sent, other, timeout, echo=False)

    # --- its end

    def close(self) -> None:
        """Kill everything that runs in this host, and remove it. For the lab."""
        namespaces.end_processes(self.namespace)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(namespaces.END_SECONDS)
        self.executor.shutdown(cancel_futures=True)
        namespaces.delete(self.namespace)


def http_get(address: str, port: int, path: str, timeout: float) -> tuple[int, bytes]:
    """GET from the host of the calling thread: status and body; 0 when there is no whole answer in time."""
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def _sent(other: Host, timeout: float, *, echo: bool) -> bool:
    """Whether a packet arrives at a socket of *other*, and one back. The calling thread is in the sender."""
    with (
        other.socket(kind=socket.SOCK_DGRAM) as theirs,
        socket.socket(type=socket.SOCK_DGRAM) as ours,
    ):
        theirs.bind((other.address, 0))
        theirs.settimeout(timeout)
        ours.settimeout(timeout)
        try:
            ours.sendto(b"ping", theirs.getsockname())
            _, sender = theirs.recvfrom(16)
            if echo:
                theirs.sendto(b"pong", sender)
                ours.recv(16)
        except OSError:  # lost, or no route while there is no carrier
            return False
        return True
