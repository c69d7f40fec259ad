"""``python -m phalanx.data.replica_process FD``: the child of a node that has the replica of one app.

It is a process of its own because locks of SQLite belong to processes, because applying must not wait for a
blocked event loop, and because checksums in Python would block one. It ends with its node: the socket closes,
and the kernel kills it (PR_SET_PDEATHSIG). It may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from phalanx.data.checkpoint_gate import CheckpointGate
from phalanx.data.handover import wal_info
from phalanx.data.replica import Replica
from phalanx.data.replica_state import WalInfo
from phalanx.data.replica_wire import LENGTH_BYTES, Failure, Reply, decode_request, framed
from phalanx.errors import DatabaseError

REST_SECONDS = 3.0
"""After so long without a request the WAL is moved into the file."""

_PR_SET_PDEATHSIG = 1


class Server:
    """Carries out one request after the other."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._replica: Replica | None = None
        self._gate = CheckpointGate()
        self._has_rested, self._rests_at = True, 0.0

    def run(self) -> None:
        """Until the node closes its end. Raises what no request can be blamed for."""
        while True:
            head = self._next()
            if not head:
                return
            length = int.from_bytes(head + self._receive(LENGTH_BYTES - 1), "big")
            request = decode_request(self._receive(length))
            self._send(self._answer(request.number, request.operation, request.arguments))
            if request.operation != "state":  # the node only looks whether this process answers
                self._has_rested, self._rests_at = False, time.monotonic() + REST_SECONDS

    def _rest_seconds(self) -> float | None:
        return None if self._has_rested else max(0.001, self._rests_at - time.monotonic())

    def _next(self) -> bytes:
        """The first byte of the next request, empty at the end. What was to be done by then is done."""
        while True:
            look, rest = self._gate.look_seconds, self._rest_seconds()
            # Not by a timeout of the socket, which is a whole number of milliseconds.
            ready, _, _ = select.select([self._channel], [], [], rest if look is None else look)
            # Also when there is always a next request: the gate opens at its time, whatever is asked.
            self._gate.look()
            if ready:
                return self._channel.recv(1)
            if look is None:
                self._rest()

    def _receive(self, count: int) -> bytearray:
        data = bytearray(count)
        view, got = memoryview(data), 0
        while got < count:
            size = self._channel.recv_into(view[got:])
            if not size:
                raise EOFError("the node is gone")
            got += size
        return data

    def _send(self, reply: Reply) -> None:
        self._channel.sendall(framed(reply))

    def say(self, level: int, text: str) -> None:
        """A line for the node's log."""
        self._send(Reply(0, [level, text]))

    def _rest(self) -> None:
        self._has_rested = True
        if self._replica is not None:
            with contextlib.suppress(DatabaseError, OSError):  # a disk that is full: it waits
                self._replica.rest()

    def _answer(self, number: int, operation: str, arguments: tuple[Any, ...]) -> Reply:
        try:
            if operation == "open":
                self._open(*arguments)
            if self._replica is None:
                raise DatabaseError("no replica is open")
            if operation == "gate":
                result = self._set_gate(*arguments)
            else:
                if operation != "state":
                    self._gate.open()  # whatever it is needs the locks itself
                result = _perform(self._replica, operation, arguments)
            return Reply(number, result, state=self._replica.describe())
        except (DatabaseError, OSError) as error:
            return Reply(number, failure=Failure.of(error))

    def _set_gate(self, live: str, closed: bool, passing: int) -> bool:
        if closed:
            return self._gate.close(Path(live), passing)
        self._gate.open()
        return False

    def _open(self, folder: str, checkpoint_pages: int) -> None:
        if self._replica is not None:
            raise DatabaseError("a replica is open already")
        self._replica = Replica.open(Path(folder), checkpoint_pages)


def _perform(replica: Replica, operation: str, arguments: tuple[Any, ...]) -> object:
    """One call. Raises DatabaseError, OSError; ValueError for one that there is not."""
    match operation, arguments:
        case (("open" | "state"), _):
            return None
        case "apply", (sequence, txid, data):
            return replica.apply(sequence, txid, Path(data) if isinstance(data, str) else data)
        case "skip", (sequence,):
            return replica.skip(sequence)
        case "sync", ():
            return replica.sync()
        case "checkpoint", ():
            return replica.checkpoint()
        case "install", (image, sequence, txid):
            return replica.install(Path(image), sequence, txid)
        case "reset", ():
            return replica.reset()
        case "snapshot", (target,):
            return replica.snapshot(Path(target))
        case "fingerprint", ():
            return replica.fingerprint()
        case "promote", (live, epoch, sealed):
            return replica.promote(Path(live), epoch, sealed)
        case "resume", (epoch, sealed):
            return replica.resume(epoch, sealed)
        case "vouch", (is_whole,):
            return replica.vouch(is_whole=is_whole)
        case "demote", (live, sequence, txid, seen):
            return replica.demote(Path(live), sequence, txid, msgspec.convert(seen, WalInfo | None))
        case "release_old", ():
            return replica.release_old()
        case "set_aside", (live, target, seen):
            return replica.set_aside(Path(live), Path(target), msgspec.convert(seen, WalInfo | None))
        case "live_wal_info", (live, salt1, salt2, offset):
            return wal_info(Path(live), salt1, salt2, offset)
        case _:
            raise ValueError(f"there is no operation {operation} with {len(arguments)} arguments")


class _ToNode(logging.Handler):
    """Log lines go to the node: this process has no log of its own."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._server.say(record.levelno, record.getMessage())


def _die_with_parent() -> None:
    # Not phalanx.system, which has asyncio with it: 40 ms and 11 MB of each replica process.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    """Serve one node to its end."""
    if len(sys.argv) != 2:
        sys.exit("phalanx.data.replica_process is started by a node")
    _die_with_parent()
    # A terminal's Ctrl-C and a service manager's SIGTERM are the node's affair: its end is this one's.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    server = Server(socket.socket(fileno=int(sys.argv[1])))
    logging.getLogger("phalanx").addHandler(_ToNode(server))
    logging.getLogger("phalanx").setLevel(logging.INFO)
    code = 0
    try:
        server.run()
    except (EOFError, ConnectionError):
        pass
    except Exception as error:
        # A bug. What is on the disk is consistent; a new process begins from there.
        code = 70
        with contextlib.suppress(OSError):
            server.say(logging.CRITICAL, f"the replica process failed: {type(error).__name__}: {error}")
    # Nothing is to be tidied up: closing the files would only have SQLite look whether it is the last one.
    os._exit(code)


if __name__ == "__main__":
    main()
