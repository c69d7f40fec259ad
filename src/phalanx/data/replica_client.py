"""The node's end of a replica process: starts it, asks it, and notices its end."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from phalanx import system
from phalanx.child import how_ended
from phalanx.data.replica_state import CHECKPOINT_PAGES, Aside, Promoted, ReplicaState, WalInfo
from phalanx.data.replica_wire import LENGTH_BYTES, Reply, Request, decode_reply, framed
from phalanx.errors import DatabaseError
from phalanx.types import Position

__all__ = ["Aside", "Promoted", "ReplicaProcess", "ReplicaState", "WalInfo"]

log = logging.getLogger("phalanx.data")
T = TypeVar("T")

MAX_REQUESTS, MAX_BYTES = 64, 32 << 20
"""What may be under way at once; more waits. One request may be larger."""

SECONDS = 15.0
"""Deadline of what takes milliseconds. The process carries out one call after the other: the deadline of each
begins with the answer to the one before, however long that took."""
LONG_SECONDS = 600.0
"""Deadline of what may copy the whole database."""

BRIEF_SECONDS, APPLY_SECONDS, SYNC_SECONDS = 10.0, 20.0, 60.0
"""How long at most the process may owe an answer to what takes milliseconds, to a record, and to what waits
for the disk. The time begins with its last answer."""

SILENT_PART, HURRY_PART = 0.1, 0.2
"""After this part of that time the process had better not be relied on; and a node that becomes active waits
no longer, as another one may have a process that answers."""

_HURRY_LOOK_SECONDS = 0.25

_CLOSE_SECONDS = 5.0
_CHECK = """
import sqlite3, sys
from urllib.parse import quote
connection = sqlite3.connect(f"file:{quote(sys.argv[1])}?mode=ro", uri=True, timeout=10)
try:
    for (line,) in connection.execute("PRAGMA integrity_check(20)"):
        print(line)
except sqlite3.OperationalError:
    raise
except sqlite3.DatabaseError as error:  # so damaged that it cannot even be checked
    print(error)
"""


class _Request(NamedTuple):
    """What was asked and is not answered yet; ``seconds``: its deadline, ``patience``: see
    :data:`BRIEF_SECONDS`."""

    answer: asyncio.Future[Any]
    size: int
    operation: str
    seconds: float
    patience: float


class ReplicaProcess:
    """The replica in *folder*, in a process of its own.

    *on_exit* is called with the reason if the process ends unasked; :meth:`start` may be called again then.
    Every other method raises DatabaseError if the process refuses or fails, is not running, or does not
    answer before its deadline: then it is killed, and a new one will find what really happened.
    """

    def __init__(
        self, folder: Path, on_exit: Callable[[str], None], *, checkpoint_pages: int = CHECKPOINT_PAGES
    ) -> None:
        self._folder, self._on_exit, self._checkpoint_pages = folder, on_exit, checkpoint_pages
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._requests: dict[int, _Request] = {}
        self._heard_at = 0.0
        self._overdue: asyncio.TimerHandle | None = None
        self._bytes = 0
        self._turn, self._room = asyncio.Lock(), asyncio.Event()
        self._number = 0
        self._closing = False
        self._ending: asyncio.Task[None] | None = None
        self._killed_because = ""
        self._state = ReplicaState(role="empty", state="empty", position=Position())

    # --- its life

    @property
    def is_running(self) -> bool:
        """Whether requests can be made."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def pid(self) -> int:
        """Its process id, 0 before the first start."""
        return self._process.pid if self._process else 0

    @property
    def known(self) -> ReplicaState:
        """All about it as the last answer says: without a wait behind what it is busy with."""
        return self._state

    @property
    def position(self) -> Position:
        """What is applied, as the last answer says."""
        return self._state.position

    @property
    def path(self) -> Path:
        """Where the replica's file is (or will be, when there is none yet); changes with a rebuild."""
        return Path(self._state.path) if self._state.path else self._folder / "gen-0" / "replica.db"

    async def start(self) -> ReplicaState:
        """Start it and have it open the folder. Raises DatabaseError, also if another process has that."""
        if self.is_running:
            raise DatabaseError("the replica process runs already")
        if self._ending is not None:
            await asyncio.shield(self._ending)
        self._closing, self._killed_because = False, ""
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        with theirs:
            try:
                self._process = _start(theirs)
            except OSError as error:
                mine.close()
                raise DatabaseError(f"the replica process cannot be started: {error.strerror}") from error
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(lambda: _Channel(self), sock=mine)
        try:
            await self._call("open", str(self._folder), self._checkpoint_pages, timeout=LONG_SECONDS)
        except BaseException:
            await self.close()
            raise
        return self._state

    async def close(self) -> None:
        """End it, however busy it is. What it was asked before may be carried out or not."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()
        if self._ending is None and self._process is not None and self._process.returncode is None:
            self._process.kill()
        if self._ending is not None:
            await asyncio.shield(self._ending)
        elif self._process is not None:
            await self._reap(self._process)

    def kill(self, reason: str) -> None:
        """SIGKILL: a new one can begin where this one has got to."""
        self._killed_because = reason
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        if self._transport is not None:
            self._transport.abort()
        self._fail_all(reason)  # it may take long to end, where a disk does not answer
        self._room.set()

    async def _reap(self, process: subprocess.Popen[bytes]) -> None:
        try:
            await asyncio.to_thread(process.wait, _CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    # --- signs of life

    @property
    def is_silent(self) -> bool:
        """Whether it has owed an answer for so long that it may hang. Answers come in order, so none to the
        oldest request is none at all."""
        if not self._requests:
            return False
        oldest = next(iter(self._requests.values()))
        return system.now() - self._heard_at > SILENT_PART * oldest.patience

    def look(self, *, hurried: bool = False) -> None:
        """Kill it when it has owed an answer for too long; where it owes none, ask for a sign of life. To be
        called every second or so: a process that hangs is not noticed otherwise while nothing is asked of it.
        """
        if not self._requests:
            self._post("state", (), 0, SECONDS, BRIEF_SECONDS).cancel()  # nobody waits for it
            return
        oldest = next(iter(self._requests.values()))
        is_short = oldest.patience <= SYNC_SECONDS
        limit = HURRY_PART * oldest.patience if hurried and is_short else oldest.patience
        if system.now() - self._heard_at > limit and self.is_running:
            self.kill(f"the replica process gave no answer to {oldest.operation} for {limit:g} s")

    async def hurry(self, work: Coroutine[Any, Any, T]) -> T:
        """Do *work*; what it asks of the process fails as soon as that has been silent for some 2 s."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                self.look(hurried=True)
                await asyncio.wait({task}, timeout=_HURRY_LOOK_SECONDS)
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # --- requests

    async def _call(
        self, operation: str, *arguments: object, timeout: float = 0.0, patience: float = 0.0
    ) -> Any:
        seconds = timeout or SECONDS
        patience = patience or (seconds if seconds > SECONDS else BRIEF_SECONDS)
        size = sum(len(argument) for argument in arguments if isinstance(argument, bytes))
        async with self._turn:  # in the order of the calls
            while self.is_running and not self._has_room(size):
                self._room.clear()
                await self._room.wait()
            answer = self._post(operation, arguments, size, seconds, patience)
        return await answer

    def _post(
        self, operation: str, arguments: tuple[object, ...], size: int, seconds: float, patience: float
    ) -> asyncio.Future[Any]:
        transport = self._transport
        if transport is None or transport.is_closing():
            raise DatabaseError("the replica process does not run")
        self._number += 1
        answer = asyncio.get_running_loop().create_future()
        self._requests[self._number] = _Request(answer, size, operation, seconds, patience)
        self._bytes += size
        if len(self._requests) == 1:
            self._begin_next()
        transport.write(framed(Request(self._number, operation, arguments)))
        return answer

    def _begin_next(self) -> None:
        """The process turns to the oldest request: from now on that one's time runs."""
        self._heard_at = system.now()
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        if self._requests:
            oldest = next(iter(self._requests.values()))
            self._overdue = asyncio.get_running_loop().call_later(oldest.seconds, self._give_up, oldest)

    def _give_up(self, request: _Request) -> None:
        self.kill(f"the replica process gave no answer to {request.operation} for {request.seconds:g} s")

    def _has_room(self, size: int) -> bool:
        return not self._requests or (len(self._requests) < MAX_REQUESTS and self._bytes + size <= MAX_BYTES)

    async def state(self) -> ReplicaState:
        """All about it."""
        await self._call("state")
        return self._state

    async def apply(self, sequence: int, txid: int, data: bytes | Path) -> Position:
        """Apply an LTX file, or what lies at that path. Raises LtxError, too."""
        what, patience = (data, APPLY_SECONDS) if isinstance(data, bytes) else (str(data), LONG_SECONDS)
        return await self._ask(
            Position, "apply", sequence, txid, what, timeout=LONG_SECONDS, patience=patience
        )

    async def skip(self, sequence: int) -> Position:
        """A seal: nothing to apply."""
        return await self._ask(Position, "skip", sequence)

    async def sync(self) -> Position:
        """Put on the disk what is applied; up to where."""
        return await self._ask(Position, "sync", timeout=LONG_SECONDS, patience=SYNC_SECONDS)

    async def checkpoint(self) -> bool:
        """Move the WAL into the file; False if readers keep some of it."""
        return await self._ask(bool, "checkpoint", timeout=LONG_SECONDS)

    async def install(self, image: Path, sequence: int, txid: int) -> Position:
        """The database file *image*, on the same file system and on the disk, becomes the replica."""
        return await self._ask(Position, "install", str(image), sequence, txid, timeout=LONG_SECONDS)

    async def reset(self) -> None:
        """Forget everything."""
        await self._call("reset", timeout=LONG_SECONDS)

    async def snapshot(self, target: Path) -> Position:
        """Write the database as it is now to the new file *target*; its position."""
        return await self._ask(Position, "snapshot", str(target), timeout=LONG_SECONDS)

    async def fingerprint(self) -> str:
        """SHA-256 of the database as it is now, in hex."""
        return await self._ask(str, "fingerprint", timeout=LONG_SECONDS)

    async def promote(self, live: Path, epoch: int, sealed: int = 0) -> Promoted:
        """The replica becomes the live database. See ``Replica.promote``."""
        return await self._ask(Promoted, "promote", str(live), epoch, sealed, timeout=LONG_SECONDS)

    async def resume(self, epoch: int, sealed: int) -> None:
        """The live database stays, for another epoch."""
        await self._call("resume", epoch, sealed)

    async def vouch(self, *, is_whole: bool = False) -> None:
        """Note that the live database is whole, or has been closed. See ``Replica.vouch``."""
        if self._state.role == "live":
            await self._call("vouch", is_whole)

    async def demote(self, live: Path, sequence: int, txid: int, seen: WalInfo | None = None) -> Position:
        """The live database, exactly at that position, becomes the replica. See ``Replica.demote``."""
        return await self._ask(Position, "demote", str(live), sequence, txid, seen, timeout=LONG_SECONDS)

    async def gate(self, live: Path, closed: bool, passing: int = 0) -> bool:
        """Keep programs from checkpoints of the live database for a moment, all but the process *passing*, or
        let them again; whether the gate is closed now. See ``CheckpointGate``."""
        return await self._ask(bool, "gate", str(live), closed, passing)

    async def release_old(self) -> None:
        """Let go of the file that :meth:`demote` has replaced: late writers may do as they like now."""
        await self._call("release_old")

    async def set_aside(self, live: Path, target: Path, seen: WalInfo | None = None) -> Aside:
        """The live database moves to *target*, or a name like it that is free; the replica is empty.

        *seen*: its log when it was looked at.
        """
        place = None if seen is None else msgspec.to_builtins(seen)
        return await self._ask(Aside, "set_aside", str(live), str(target), place, timeout=LONG_SECONDS)

    async def live_wal_info(self, live: Path, salt1: int, salt2: int, offset: int) -> WalInfo:
        """What the WAL of the database at *live* has, and how much of it after that place."""
        return await self._ask(
            WalInfo, "live_wal_info", str(live), salt1, salt2, offset, timeout=LONG_SECONDS
        )

    async def _ask(
        self,
        kind: type[T],
        operation: str,
        *arguments: object,
        timeout: float = 0.0,
        patience: float = 0.0,
    ) -> T:
        answer = await self._call(operation, *arguments, timeout=timeout, patience=patience)
        return msgspec.convert(answer, kind)

    async def verify(self, timeout: float = LONG_SECONDS) -> list[str]:
        """What SQLite's integrity check finds in the replica, nothing as a rule. In a process of its own:
        the replica goes on meanwhile. Raises DatabaseError."""
        if not self._state.path:
            raise DatabaseError(f"the replica is {self._state.state}")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-c",
            _CHECK,
            self._state.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(timeout):
                output, errors = await process.communicate()
        except TimeoutError:
            raise DatabaseError(f"the integrity check took more than {timeout:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            last = errors.decode(errors="replace").strip().splitlines()[-1:]
            raise DatabaseError(f"the integrity check failed: {' '.join(last)}")
        lines = output.decode().splitlines()
        return [] if lines == ["ok"] else lines

    # --- what it says

    def on_reply(self, reply: Reply) -> None:
        """One message of the process."""
        if reply.number == 0:
            level, text = reply.result
            log.log(level, "replica in %s: %s", self._folder, text)
            return
        answer, size, _, _, _ = self._requests.pop(reply.number)
        self._begin_next()
        self._bytes -= size
        self._room.set()
        if reply.state is not None:
            self._state = reply.state
        if answer.done():
            return  # whoever asked was cancelled
        if reply.failure is not None:
            answer.set_exception(reply.failure.error())
        else:
            answer.set_result(reply.result)

    def on_closed(self) -> None:
        """It has closed its end, or the node has."""
        self._transport = None
        self._ending = asyncio.create_task(self._ended(), name="replica process end")

    async def _ended(self) -> None:
        process = self._process
        assert process is not None
        await self._reap(process)
        reason = self._killed_because or f"the replica process {how_ended(process.returncode)}"
        self._fail_all(reason)
        self._requests, self._bytes = {}, 0
        self._begin_next()
        self._room.set()
        self._ending = None
        if not self._closing:
            self._on_exit(reason)

    def _fail_all(self, reason: str) -> None:
        for request in self._requests.values():
            if not request.answer.done():
                request.answer.set_exception(DatabaseError(reason))


class _Channel(asyncio.Protocol):
    """Cuts what the process says into messages."""

    def __init__(self, client: ReplicaProcess) -> None:
        self._client, self._buffer = client, bytearray()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(buffer[:LENGTH_BYTES], "big")
            if len(buffer) < end:
                return
            message = bytes(buffer[LENGTH_BYTES:end])
            del buffer[:end]
            self._client.on_reply(decode_reply(message))

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.on_closed()


def _start(channel: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "phalanx.data.replica_process", str(channel.fileno())],
        pass_fds=[channel.fileno()],
        stdin=subprocess.DEVNULL,
        # A session of its own, so that a terminal's signals do not reach it.
        start_new_session=True,
    )
