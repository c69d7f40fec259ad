"""The node's own session, as its keeper reports it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from phalanx import child, system
from phalanx.aio import wait_at_most
from phalanx.config import Logging, NatsOptions
from phalanx.decide.session import StreamList
from phalanx.decide.timing import Timing
from phalanx.errors import BackendError, SessionLost
from phalanx.keeper import wire
from phalanx.types import Resource, SessionId

log = logging.getLogger("phalanx.session")

REGISTER_TIMEOUT_SECONDS = 2.0


class Session:
    """One session: starts a keeper, knows how long it is valid, registers what runs.

    ``valid_until`` is on ``system.now()``'s clock and moves with every renewal. ``lost`` is set once,
    with the reason in ``lost_reason``: then everything that hung on the session must end at once.
    """

    def __init__(self, session: SessionId, timing: Timing) -> None:
        self.id, self.timing = session, timing
        self.valid_until = float("-inf")
        self.renewals = 0
        self._extended: dict[str, float] = {}
        self._is_outlived = False
        self.on_extended: Callable[[], None] = lambda: None
        """Told when :meth:`right_until` has moved for an app."""
        self.established = asyncio.Event()
        self.lost = asyncio.Event()
        self.lost_reason = ""
        self._released = asyncio.Event()
        self._releasing = False
        self._acks: dict[int, asyncio.Future[str]] = {}
        """By number of registration: what is wrong with it, empty if nothing is."""
        self._numbers = itertools.count(1)
        self._transport: asyncio.WriteTransport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stranger: system.ProcessRef | None = None
        """The keeper, where this process has not started it but taken it up."""
        self.adopted: tuple[Resource, ...] = ()
        """What ran when the session was taken up."""
        self._left = asyncio.Event()
        self._leaving = False
        self.registered: dict[str, Resource] = {}
        """What the keeper knows to run, by id."""
        self._beating: asyncio.Task[None] | None = None
        self._on_change: list[Callable[[], None]] = []
        self.on_renewed: Callable[[float], None] = lambda moment: None
        """Told of each renewal: until when the session is valid now."""
        self.on_noted: Callable[[str, str], None] = lambda action, reason: None
        """Told of what the keeper has for the audit log: action and reason."""

    @property
    def is_valid(self) -> bool:
        """Whether the session is this node's at this very moment."""
        return not (self._releasing or self.lost.is_set()) and system.now() < self.valid_until

    def covers(self, app: str) -> bool:
        """Whether something of *app* may run now: by the session, or by promises that reach past it."""
        over = self._releasing or self.lost.is_set()
        return not over and system.now() < self.right_until(app)

    def right_until(self, app: str) -> float:
        """Until when that is so, as known now."""
        return max(self.valid_until, self._extended.get(app, float("-inf")))

    def note_outlived(self) -> None:
        """The session is over, and something goes on without it: what hung on the session (locks) is told."""
        if not self._is_outlived:
            self._is_outlived = True
            self._tell()

    @property
    def was_extended(self) -> bool:
        """Whether something may have outlived the session, or may do so yet."""
        return bool(self._extended)

    def extend(self, app: str, moment: float) -> bool:
        """*app* may go on until *moment*, also without the session: the keeper has to know.

        False, and nothing is changed, if the keeper cannot be told: it would kill the node for what it
        does not know.
        """
        keeper = None if self.lost.is_set() else self._transport
        if keeper is not None and not wire.send(keeper, wire.Extend(app, moment)):
            log.warning("app %s: the keeper cannot be told that it may go on without NATS", app)
            return False
        self._extended[app] = max(self._extended.get(app, float("-inf")), moment)
        self.on_extended()
        return True

    def withdraw(self, app: str) -> None:
        """A reign over *app* begins: what an earlier one was promised is not for it. The keeper is told.

        Sent also if this life of the node has extended nothing: an earlier one, with this keeper, may have.
        """
        self._extended.pop(app, None)
        if self._transport is None or self.lost.is_set():
            return
        if not wire.send(self._transport, wire.Extend(app, wire.WITHDRAWN)):
            self._lose("the keeper cannot be told what was withdrawn")

    @property
    def may_begin(self) -> bool:
        """Whether there is time enough to begin something: the session does not run out just now."""
        return self.is_valid and system.now() < self.timing.stand_down_at(self.valid_until)

    @property
    def keeper_pid(self) -> int:
        """The keeper's process id; 0 before it was started."""
        if self._stranger is not None:
            return self._stranger.pid
        return self._process.pid if self._process else 0

    @property
    def is_taken_up(self) -> bool:
        """Whether it was the session of an earlier life of this node, which has ended in a pause."""
        return self._stranger is not None

    def on_change(self, callback: Callable[[], None]) -> None:
        """Be told when the session was lost, or may be used (again) after it nearly ran out."""
        self._on_change.append(callback)

    async def start(
        self,
        platform: str,
        streams: StreamList,
        nats: NatsOptions,
        state_dir: Path,
        timeout: float,
        logging: Logging | None = None,
    ) -> None:
        """Start the keeper and wait for the session. Raises SessionLost when it cannot be had in time."""
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        with theirs:
            try:
                self._process = _start_keeper(theirs)
            except OSError as error:
                mine.close()
                raise SessionLost(str(self.id), f"its keeper cannot be started: {error.strerror}") from error
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: _Channel(self), sock=mine)
        self._transport = transport
        start = wire.Start(
            platform, self.id, streams, self.timing, nats, str(state_dir), socket.gethostname(), logging
        )
        wire.send(transport, start)
        self._beating = asyncio.create_task(self._beat(), name="session beat")
        waits = [asyncio.create_task(self.established.wait()), asyncio.create_task(self.lost.wait())]
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            if not self.established.is_set() and not self.lost.is_set():
                # Also when this start is cancelled: a keeper that nobody knows must not hold the session.
                wire.send(transport, wire.Release("its start was given up"))
        if not self.established.is_set():
            reason = self.lost_reason or f"no majority of session streams answered within {timeout:g} s"
            await self.close()
            raise SessionLost(str(self.id), reason)

    async def go_on(
        self, channel: socket.socket, keeper: system.ProcessRef, resources: tuple[Resource, ...], rest: bytes
    ) -> None:
        """Take the session up from *keeper*, which has accepted us on *channel*; *rest* is what it has said
        since then. Raises SessionLost."""
        self._stranger, self.adopted = keeper, resources
        self.registered = {resource.id: resource for resource in resources}
        protocol = _Channel(self)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: protocol, sock=channel)
        self._transport = transport
        protocol.data_received(rest)
        self._beating = asyncio.create_task(self._beat(), name="session beat")
        await wait_at_most(self.established, self.timing.ttl)
        if not self.established.is_set():
            await self.close()
            raise SessionLost(str(self.id), "its keeper does not say that it is valid")

    async def _beat(self) -> None:
        interval = min(0.5, self.timing.stall_limit / 5)
        while self._transport is not None and not self._transport.is_closing():
            wire.send(self._transport, wire.Beat())
            await asyncio.sleep(interval)

    async def register(self, resource: Resource) -> None:
        """Tell the keeper what is about to start, and wait until it would kill that if this node died.

        Raises SessionLost if it does not confirm in time; BackendError if it cannot take note of it (its
        disk is full, or read-only): the session lives, but this must not start.
        """
        if self._transport is None or not self.covers(resource.app):
            raise SessionLost(str(self.id), self.lost_reason or "not valid")
        number = next(self._numbers)
        ack = self._acks[number] = asyncio.get_running_loop().create_future()
        try:
            wire.send(self._transport, wire.Register(number, resource))
            problem = await asyncio.wait_for(ack, REGISTER_TIMEOUT_SECONDS)
        except TimeoutError:
            self._lose("the keeper does not answer")
            raise SessionLost(str(self.id), self.lost_reason) from None
        finally:
            self._acks.pop(number, None)
        if problem:
            raise BackendError(
                resource.app,
                "start",
                f"the keeper cannot take note of it: {problem}",
                "make the data directory writable and free space there",
            )
        self.registered[resource.id] = resource

    def unregister(self, resource_id: str) -> None:
        """Tell the keeper that this has ended."""
        self.registered.pop(resource_id, None)
        if self._transport is not None:
            wire.send(self._transport, wire.Unregister(resource_id))

    def keep(self, keep: wire.Keep) -> None:
        """Tell the keeper what is to outlive this process if it ends now, in a pause."""
        if self._transport is not None and not self.lost.is_set():
            wire.send(self._transport, keep)

    async def leave(self, keep: wire.Keep, timeout: float = 5.0) -> bool:
        """Leave the session and what *keep* names to the keeper: the caller vouches that nothing of its own
        code hangs on it. False if the keeper does not agree in time; then it is the caller's as before."""
        if self._transport is None or self.lost.is_set():
            return False
        self._leaving = True
        wire.send(self._transport, wire.Leave(keep))
        await wait_at_most(self._left, timeout)
        if not self._left.is_set():
            self._leaving = False
            return False
        self._releasing = True  # from here on it is not ours
        self._tell()
        return True

    def use_streams(self, streams: StreamList) -> None:
        """Tell the keeper about a new list of session streams."""
        if self._transport is not None:
            wire.send(self._transport, wire.Streams(streams))

    async def release(self, reason: str, timeout: float = 3.0) -> bool:
        """End the session: the caller vouches that nothing hangs on it. True when a majority knows."""
        if self._transport is None or self.lost.is_set():
            return False
        # From here on nothing may rely on it: whoever holds a lock through it learns that first.
        self._releasing = True
        self._tell()
        wire.send(self._transport, wire.Release(reason))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._released.wait()
        return self._released.is_set()

    def give_up(self, reason: str) -> None:
        """It cannot be used as it is: all that hangs on it ends, by the keeper where nobody else does it."""
        self._lose(reason)

    async def close(self) -> None:
        """Let go of the keeper: it kills what is still registered and exits. Waits for its end, bounded."""
        if self._transport is not None and not (self._released.is_set() or self._left.is_set()):
            # Without a goodbye the keeper would take this for a crash, and kill this process.
            self._releasing = True
            wire.send(self._transport, wire.Release("closed"))
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        if self._transport is not None:
            self._transport.close()
        if self._left.is_set():
            return
        if self._process is not None:
            await asyncio.to_thread(self._reap, self._process)
        elif self._stranger is not None:
            await self._see_end_of(self._stranger)

    async def _see_end_of(self, keeper: system.ProcessRef) -> None:
        deadline = system.now() + 1.0
        while keeper.alive():
            if system.now() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(keeper.pid, signal.SIGKILL)
            await asyncio.sleep(0.02)

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            # Still trying to write tombstones without NATS. It has nothing to fence any more.
            process.kill()
            process.wait()
            return
        if process.returncode:
            log.error("session %s: its keeper %s", self.id, child.how_ended(process.returncode))

    # --- what the keeper says

    def on_message(self, message: wire.FromKeeper) -> None:
        """One message of the keeper."""
        match message:
            case wire.Established():
                self.established.set()
            case wire.ValidUntil(moment, renewals):
                could_begin = self.may_begin
                self.valid_until, self.renewals = moment, renewals
                self.on_renewed(moment)
                if not could_begin:
                    self._tell()
            case wire.Registered(number):
                self._acknowledge(number, "")
            case wire.Refused(number, problem):
                self._acknowledge(number, problem)
            case wire.Noted(action, reason):
                self.on_noted(action, reason)
            case wire.Lost(reason):
                self._lose(reason)
            case wire.Released(complete):
                if complete and self._releasing:
                    self._released.set()
            case wire.Left():
                self._left.set()
            case wire.Attached():
                pass  # it was read before the channel was made

    def _acknowledge(self, number: int, problem: str) -> None:
        ack = self._acks.get(number)
        if ack is not None and not ack.done():
            ack.set_result(problem)

    def _tell(self) -> None:
        for callback in list(self._on_change):
            callback()

    def off_change(self, callback: Callable[[], None]) -> None:
        """No longer be told."""
        if callback in self._on_change:
            self._on_change.remove(callback)

    def on_closed(self) -> None:
        """The keeper's end of the channel closed."""
        if not (self._released.is_set() or self._left.is_set()):
            self._lose("the keeper is gone")

    def _lose(self, reason: str) -> None:
        if not self.lost.is_set():
            self.lost_reason = reason
            self.lost.set()
            for ack in self._acks.values():
                if not ack.done():
                    ack.set_exception(SessionLost(str(self.id), reason))
            self._tell()


def _start_keeper(channel: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "phalanx.keeper", str(channel.fileno()), str(os.getpid())],
        pass_fds=[channel.fileno()],
        stdin=subprocess.DEVNULL,
        # A session of its own, so that a terminal's signals do not reach it; see keeper/__main__.py.
        start_new_session=True,
    )


class _Channel(asyncio.Protocol):
    def __init__(self, session: Session) -> None:
        self._session, self._lines = session, wire.Lines()

    def data_received(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            self._session.on_message(wire.decode_from_keeper(line))

    def connection_lost(self, exc: Exception | None) -> None:
        self._session.on_closed()
