"""The node's side of its holder: the process whose children its programs are, so that they can outlive it.

One per node, started when the node starts, or met where an earlier life has left one in a pause. What it does
and how it is spoken to: :mod:`phalanx.backends.holder_process`.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from phalanx import child, system, unix_socket
from phalanx.backends.held import HeldProcess

log = logging.getLogger("phalanx.backend")

SOCKET = "holder.sock"
VERSION = 1
"""As in :mod:`.holder_process`, which this process never imports."""

ANSWER_SECONDS = 5.0
"""A holder that has not answered by then stands still."""

END_SECONDS = 2.0
MAX_PENDING = 64
"""Requests under way at once, and ends that are known before the start was noticed."""

_PROGRAM = Path(__file__).with_name("holder_process.py")
_LOOK_SECONDS = 0.02
_CHUNK = 1 << 16
_MAX_LINE_BYTES = 1 << 20
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class HolderGone(OSError):
    """It has ended, or does not answer."""


class Claim(NamedTuple):
    """A program that an earlier life of the node has left with its holder. ``code``: None while it runs."""

    ref: system.ProcessRef
    code: int | None


class Taken(NamedTuple):
    """What an adopted program has written meanwhile, and the descriptor of its control group, if any."""

    process: HeldProcess
    output: bytes
    dropped: int
    group: int | None


class Holder:
    """Use it as a context for the node's life, after the lock on *state_dir*. One event loop, no threads."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._opening = asyncio.Lock()
        self._warming: asyncio.Task[None] | None = None
        self._link: _Link | None = None

    async def __aenter__(self) -> Self:
        """Begin to start it, so that it is there when a program is to start, or meet the one that is."""
        self._warming = asyncio.create_task(self._warm_up(), name="holder")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _warm_up(self) -> None:
        try:
            await self._opened()
        except OSError as error:
            log.warning("the holder of programs does not start yet: %s", error)

    async def close(self) -> None:
        """Part from it. It ends, unless something of it is to outlive the node in a pause."""
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
        async with self._opening:
            link, self._link = self._link, None
        if link is not None:
            await link.part()

    # --- requests

    async def spawn(
        self,
        marker: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        identity: child.Identity | None,
        stdin: int,
        group: tuple[str, int] | None,
        on_line: Callable[[str], None],
        on_exit: Callable[[], None],
    ) -> HeldProcess:
        """Start *command* as :func:`phalanx.child.spawn` does, with the descriptor *stdin*. *group*: path and
        held descriptor of its control group, which stays held as long as it is known there.

        Raises OSError: what the kernel says, or HolderGone.
        """
        link = await self._opened()
        reading, writing = os.pipe()
        try:
            descriptors = [stdin, writing, reading, *([group[1]] if group else [])]
            answer, _ = await link.ask(
                {
                    "do": "spawn",
                    "id": marker,
                    "argv": list(command),
                    "env": dict(env),
                    "cwd": cwd,
                    "user": identity.user if identity else None,
                    "group": identity.group if identity else None,
                    "groups": list(identity.groups) if identity else None,
                    "cgroup": group[0] if group else "",
                },
                descriptors,
                on_late=lambda: link.forget(marker),
            )
            _raise_refusal(answer)
            ref = system.ProcessRef(answer["pid"], answer["start_time"])
            return link.follow(marker, ref, os.dup(reading), on_line, on_exit)
        finally:
            os.close(reading)
            os.close(writing)

    async def claim(self, marker: str) -> Claim | None:
        """What an earlier life has left under *marker*; None if that is not known here. Raises HolderGone."""
        return (await self._opened()).claims.get(marker)

    async def take(
        self, marker: str, on_line: Callable[[str], None], on_exit: Callable[[], None]
    ) -> Taken | None:
        """Take that up: from now on it is as if started here. Raises OSError, HolderGone."""
        link = await self._opened()
        claim = link.claims.get(marker)
        if claim is None:
            return None
        answer, descriptors = await link.ask({"do": "take", "id": marker}, [])
        _raise_refusal(answer)
        claim = link.claims.pop(marker, claim)  # it may have ended, or been forgotten, meanwhile
        process = link.follow(marker, claim.ref, descriptors[0], on_line, on_exit)
        if claim.code is not None:
            process.on_code(claim.code)
        group = descriptors[1] if len(descriptors) > 1 else None
        return Taken(process, binascii.a2b_base64(answer["output"]), answer["dropped"], group)

    def forget_claim(self, marker: str) -> None:
        """Nothing of that runs any more, and nobody takes it up."""
        if self._link is not None and marker in self._link.claims:
            self._link.forget(marker)

    async def forget_claims(self, app: str) -> None:
        """Nobody takes up what an earlier life has left of *app*; what runs of it is killed.

        Returns when nothing of it is held any more.
        """
        link = self._link
        left = [one for one in (link.claims if link else ()) if one.startswith(f"{app}.")]
        if link is None or not left:
            return
        for marker in left:
            link.forget(marker)
        try:
            await link.ask({"do": "sync"}, [])
        except HolderGone as error:
            log.error("app %s: what an earlier life has left may be held still: %s", app, error)

    # --- the process

    async def _opened(self) -> _Link:
        """The connection; made if there is none. Raises HolderGone, OSError."""
        async with self._opening:
            if self._link is not None and self._link.is_gone:
                gone, self._link = self._link, None
                await gone.part()
            if self._link is None:
                try:
                    self._link = await self._meet() or await self._start()
                except HolderGone:
                    raise
                except OSError as error:
                    raise HolderGone(f"the holder of programs cannot be started: {error}") from error
            return self._link

    async def _meet(self) -> _Link | None:
        """The holder that an earlier life has left, if any that can be used."""
        path = self._state_dir / SOCKET
        deadline = system.now() + ANSWER_SECONDS
        while True:
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            channel.setblocking(False)
            try:
                with unix_socket.short_path(path) as short:
                    channel.connect(short)
            except OSError:
                channel.close()
                return None
            pid, _ = unix_socket.peer(channel)
            link = _Link(channel, None, pid)
            try:
                version = await link.hello(max(0.1, deadline - system.now()))
            except HolderGone as error:
                await link.part()
                if system.now() < deadline:
                    await asyncio.sleep(
                        _LOOK_SECONDS
                    )  # it is just ending, or has not parted from that life yet
                    continue
                log.error("killing the holder of an earlier life, process %d: %s", pid, error)
                await child.in_thread(partial(_kill, pid))
                return None
            if version == VERSION:
                return link
            log.warning(
                "the holder of an earlier life speaks version %s, not %d: what it holds ends",
                version,
                VERSION,
            )
            link.send({"do": "end"}, [])
            await link.see_end(END_SECONDS)
            await link.part()
            await child.in_thread(partial(_kill, pid))
            return None

    async def _start(self) -> _Link:
        mine, theirs = socket.socketpair()
        try:
            process = await child.in_thread(partial(_spawn, self._state_dir, theirs))
        except BaseException:
            mine.close()
            raise
        finally:
            theirs.close()
        link = _Link(mine, process, process.pid)
        try:
            await link.hello(ANSWER_SECONDS)
        except BaseException:
            await link.part()
            raise
        log.debug("the holder of programs is process %d", process.pid)
        return link


def _raise_refusal(answer: dict[str, Any]) -> None:
    if number := answer.get("errno", 0):
        raise OSError(number, os.strerror(number))


_parted: set[int] = set()
"""Holders that this process has started and left running, in a pause: it may go on, and is their parent."""


def _reap_parted() -> None:
    for pid in list(_parted):
        try:
            is_over = os.waitpid(pid, os.WNOHANG)[0] != 0
        except ChildProcessError:
            is_over = True
        if is_over:
            _parted.discard(pid)


def _spawn(state_dir: Path, theirs: socket.socket) -> subprocess.Popen[bytes]:
    _reap_parted()
    with unix_socket.bind(state_dir / SOCKET) as listening:
        numbers = (listening.fileno(), theirs.fileno())
        env = {name: text for name, text in child.environment().items() if name != system.MARKER_ENV}
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(_PROGRAM), str(state_dir.absolute()), *map(str, numbers)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=numbers,
            start_new_session=True,
        )


def _kill(pid: int) -> None:
    """SIGKILL that holder, which the kernel has named; not another process that has its pid by now."""
    if any(part.endswith(_PROGRAM.name) for part in system.command_line(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- one connection


class _Asked(NamedTuple):
    answer: asyncio.Future[tuple[dict[str, Any], list[int]]]
    on_late: Callable[[], None]


class _Link:
    """Everything between this process and one holder. Nothing here waits but :meth:`ask` and the ends."""

    def __init__(self, channel: socket.socket, process: subprocess.Popen[bytes] | None, pid: int) -> None:
        channel.setblocking(False)
        self._channel, self._process, self._pid = channel, process, pid
        self.claims: dict[str, Claim] = {}
        self.is_gone = False
        self._over = asyncio.Event()
        self._asked: dict[int, _Asked] = {}
        self._number = 0
        self._held: dict[str, HeldProcess] = {}
        self._early: dict[str, int] = {}
        """Codes of what has ended before anybody followed it: that comes with the answer to its start."""
        self._incoming, self._descriptors = b"", list[int]()
        self._outgoing: deque[tuple[bytes, list[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(channel.fileno(), self._readable)

    async def hello(self, seconds: float) -> int:
        """Its version, once it has said it. Raises HolderGone."""
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(self._hello)
        except TimeoutError:
            raise HolderGone(f"no word from it within {seconds:.1f} s") from None

    async def ask(
        self,
        message: dict[str, Any],
        descriptors: Sequence[int],
        on_late: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, Any], list[int]]:
        """Its answer, and the descriptors with it. *on_late*: what to do if that comes after nobody waits.

        Raises HolderGone if it has ended, or does not answer in time.
        """
        if self.is_gone or len(self._asked) >= MAX_PENDING:
            raise HolderGone(
                "the holder of programs has ended" if self.is_gone else "the holder is overloaded"
            )
        self._number += 1
        number = self._number
        asked = _Asked(self._loop.create_future(), on_late)
        self._asked[number] = asked
        self.send({**message, "number": number}, descriptors)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await asyncio.shield(asked.answer)
        except TimeoutError:
            self._give_up()
            raise HolderGone(f"the holder of programs has not answered within {ANSWER_SECONDS:g} s") from None
        finally:
            if not asked.answer.done():
                asked.answer.cancel()

    def _give_up(self) -> None:
        """It stands still. If it holds nothing another one can take its place at once."""
        if not self._held and not self.claims:
            log.error(
                "the holder of programs, process %d, stands still and holds nothing: killing it", self._pid
            )
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._on_end()  # at once: whoever starts something next must not ask it, while it dies

    def follow(
        self,
        marker: str,
        ref: system.ProcessRef,
        output: int,
        on_line: Callable[[str], None],
        on_exit: Callable[[], None],
    ) -> HeldProcess:
        """Be told of the end of a program that it holds."""
        process = HeldProcess(ref, output, lambda: self.forget(marker), on_line, on_exit)
        self._held[marker] = process
        if (code := self._early.pop(marker, None)) is not None:
            process.on_code(code)
        if self.is_gone:
            process.on_holder_gone()
        return process

    def forget(self, marker: str) -> None:
        """Nothing of that runs any more."""
        self._held.pop(marker, None)
        self.claims.pop(marker, None)
        self._early.pop(marker, None)
        if not self.is_gone:
            self.send({"do": "forget", "id": marker}, [])

    # --- its end

    async def see_end(self, seconds: float) -> bool:
        """Whether it has closed the connection within that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
        return self.is_gone

    async def part(self) -> None:
        """Close the connection. One that we have started and that holds nothing is seen to end."""
        holds = not self.is_gone and bool(self._held or self.claims)
        for process in self._held.values():
            process.leave()
        self._close()
        if self._process is not None:
            await child.finish(child.in_thread(partial(_see_end, self._process, holds)))

    def _close(self) -> None:
        if self.is_gone:
            return
        self.is_gone = True
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        self._channel.close()
        for _, descriptors in self._outgoing:
            self._descriptors += descriptors
        self._outgoing.clear()
        for one in self._descriptors:
            os.close(one)
        self._descriptors.clear()
        gone = HolderGone("the holder of programs has ended")
        for asked in self._asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(gone)
                asked.answer.exception()
        self._asked.clear()
        if not self._hello.done():
            self._hello.set_exception(gone)
            self._hello.exception()
        self._over.set()

    def _on_end(self) -> None:
        """It has closed its end: it is dead, or has thrown us out."""
        self._close()
        if self._held:
            log.error("the holder of programs, process %d, has ended, and its programs with it", self._pid)
        for process in list(self._held.values()):
            process.on_holder_gone()

    # --- the wire

    def send(self, message: dict[str, Any], descriptors: Sequence[int]) -> None:
        """Queue *message* with copies of *descriptors*."""
        own = [os.dup(one) for one in descriptors]
        self._outgoing.append((json.dumps({**message, "fds": len(own)}).encode() + b"\n", own))
        self._flush()

    def _flush(self) -> None:
        while self._outgoing and not self.is_gone:
            data, descriptors = self._outgoing[0]
            try:
                sent = socket.send_fds(self._channel, [data], descriptors)
            except BlockingIOError:
                self._loop.add_writer(self._channel.fileno(), self._flush)
                return
            except OSError:
                return  # its end is read soon
            for one in descriptors:
                os.close(one)
            self._outgoing[0] = (data[sent:], [])
            if sent == len(data):
                self._outgoing.popleft()
        if not self.is_gone:
            self._loop.remove_writer(self._channel.fileno())

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._channel, _CHUNK, 16, _CLOSE_ON_EXEC)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", list[int]()
        self._incoming += data
        self._descriptors += descriptors
        *lines, self._incoming = self._incoming.split(b"\n")
        if not data or len(self._incoming) > _MAX_LINE_BYTES:
            self._on_end()
            return
        for line in lines:
            try:
                self._on_message(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                log.error("the holder of programs is not understood: %r", error)
                self._on_end()
                return

    def _on_message(self, message: dict[str, Any]) -> None:
        count = int(message.get("fds", 0))
        descriptors = self._descriptors[:count]
        del self._descriptors[:count]
        if "hello" in message:
            self.claims = {
                one["id"]: Claim(system.ProcessRef(one["pid"], one["start_time"]), one["code"])
                for one in message["programs"]
            }
            if not self._hello.done():
                self._hello.set_result(int(message["hello"]))
        elif "ended" in message:
            self._on_code(message["ended"], int(message["code"]))
        elif (asked := self._asked.pop(message["number"], None)) is not None and not asked.answer.done():
            asked.answer.set_result((message, descriptors))
        else:
            for one in descriptors:
                os.close(one)
            if asked is not None:
                asked.on_late()

    def _on_code(self, marker: str, code: int) -> None:
        if (process := self._held.get(marker)) is not None:
            process.on_code(code)
        elif (claim := self.claims.get(marker)) is not None:
            self.claims[marker] = claim._replace(code=code)
        else:
            self._early[marker] = code
            if len(self._early) > MAX_PENDING:
                del self._early[next(iter(self._early))]


def _see_end(process: subprocess.Popen[bytes], holds: bool) -> None:
    """Reap it. One that *holds* something may outlive us, and then it is nobody's child any more."""
    try:
        process.wait(0 if holds else END_SECONDS)
    except subprocess.TimeoutExpired:
        if holds:
            process.returncode = 0  # no warning that it runs on: it is meant to
            _parted.add(process.pid)
            return
        process.kill()
        process.wait()
