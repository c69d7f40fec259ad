"""The holder's own process: the parent of a node's programs, so that they can outlive the node in a pause.

:mod:`phalanx.backends.holder` starts it as a file, not as a module (``python -I -S holder_process.py``). It
imports only the standard library, and little of that: some megabytes, some milliseconds. It has one thread,
so the kernel ends the programs with it (prctl(2), PR_SET_PDEATHSIG: with the *thread* that started them).
Hence a few things of :mod:`phalanx.system`, :mod:`phalanx.unix_socket` and the other end of the connection
stand here once more, on purpose, and only as far as it needs them.

What it is not: it decides nothing about who may be active, and no kill goes through it. Node, keeper and
warden kill processes and control groups themselves, however this one fares.

When it ends what it holds, by itself: when the node's connection closes, unless ``keeper.json`` beside its
socket names a keeper that lives: then this is a pause, and the keeper decides. And when that keeper has gone
too, or nobody has come for ``AWAY_SECONDS``. The invariant: what it holds never outlives node and keeper.

The protocol, one JSON object a line; ``fds`` counts the descriptors that come with its first byte (unix(7),
SCM_RIGHTS). From here first ``{"hello": VERSION, "pid", "programs": [{"id", "pid", "start_time", "code"}]}``;
that, and ``{"do": "end"}``, keep their form for ever. Then from the node, each with a ``number``:

- ``spawn``: ``id``, ``argv``, ``env``, ``cwd``, ``user``, ``group``, ``groups`` (null: as the node),
  ``cgroup`` (its path, or empty), with the program's stdin, its output's writing and reading end, and the
  held descriptor of the control group, if it has one. Answer: ``pid`` and ``start_time``, or ``errno``.
- ``take``: ``id``. The node reads its output from now on. Answer: ``output`` (base64: what it has written
  since nobody did), ``dropped`` (bytes of that which were too many), with the pipe's reading end, and the
  descriptor of the control group; or ``errno``.
- ``forget``: ``id``, no answer. Nothing of it runs; its pid may become another's.
- ``sync``: answered once everything before it is done (an older holder says ``errno``, then, too).

To the node, whenever a program ends: ``{"ended": id, "code"}``, negative for a signal.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from types import FrameType
from typing import Any

VERSION = 1
"""Grows with every change after which node and holder of different versions would misread each other."""

AWAY_SECONDS = 630.0
"""How long it waits for the node's next life: somewhat longer than the keeper does, which decides."""

KEPT_BYTES = 1 << 18
"""So much of each program's output is kept while no node reads it; of more, the oldest is dropped."""

LOOK_SECONDS = 0.1
"""Between looks at the keeper while there is no node."""

STOPPED_SECONDS = 0.5
"""A keeper that stands still (SIGSTOP) for longer while there is no node is as good as dead. With a look and
the renewal before, that is still within the shortest session (1 s)."""

KILL_SECONDS = 10.0

MARKER_ENV = "PHALANX_SECTION"

_NOTE = "keeper.json"
_CHUNK = 1 << 16
_REST_SECONDS = 0.002
_PEER = struct.Struct("3i")


def now() -> float:
    """Seconds since boot, time asleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def stat(pid: int) -> tuple[int, str]:
    """When *pid* started, in clock ticks since boot, and its state, a letter of proc_pid_stat(5).

    0 and Z if there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0, "Z"
    state = fields[0].decode()
    return int(fields[19]), "R" if state in "ZX" and int(fields[17]) > 1 else state  # other threads run


class Held:
    """One program."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], output: int, group: int, path: str
    ) -> None:
        self.name, self.process, self.output, self.group, self.path = name, process, output, group, path
        self.pid, (self.start_time, _) = process.pid, stat(process.pid)
        self.code: int | None = None
        self.kept, self.dropped = bytearray(), 0
        self.is_taken = True
        """Whether a node reads its output."""

    def look(self) -> bool:
        """Whether it has ended, and that was not known before. It stays a zombie: its pid is its own."""
        if self.code is not None:
            return False
        with contextlib.suppress(ChildProcessError):
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None:
                return False
            self.code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            return True
        self.code = -signal.SIGKILL
        return True

    def keep_output(self) -> bool:
        """Read some of it; False at its end."""
        try:
            data = os.read(self.output, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.kept += data
        if (over := len(self.kept) - KEPT_BYTES) > 0:
            del self.kept[:over]
            self.dropped += over
        return bool(data)

    def kill(self) -> bool:
        """SIGKILL all that can be found of it; whether nothing was."""
        clean = self.code is not None
        if self.path:
            with contextlib.suppress(OSError), open(f"{self.path}/cgroup.kill", "wb", buffering=0) as file:
                file.write(b"1")
            with contextlib.suppress(OSError), open(f"{self.path}/cgroup.procs", "rb") as file:
                clean = clean and not file.read()
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        entry = f"{MARKER_ENV}={self.name}".encode()
        for name in os.listdir("/proc"):
            if name.isdigit() and _has(int(name), entry):
                clean = False
                with contextlib.suppress(OSError):
                    os.kill(int(name), signal.SIGKILL)
        return clean

    def close(self) -> None:
        """Let go of all that is held for it; its pid, too, if it has ended."""
        for descriptor in (self.output, self.group):
            if descriptor >= 0:
                os.close(descriptor)
        self.output = self.group = -1
        self.process.poll()

    def remove_group(self) -> None:
        """Remove its control group, and those that it has made below; what is not empty stays."""
        for folder, _, _ in os.walk(self.path, topdown=False) if self.path else ():
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _has(pid: int, entry: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return entry in file.read().split(b"\0")
    except OSError:
        return False


class Link:
    """The connection to the node."""

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self.channel = channel
        self._incoming, self._descriptors = b"", list[int]()
        self._outgoing: deque[tuple[bytes, list[int]]] = deque()

    def receive(self) -> list[tuple[dict[str, Any], list[int]]] | None:
        """The messages that have come, each with its descriptors; None at the end of the connection."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.channel, _CHUNK, 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._incoming += data
        self._descriptors += descriptors
        *lines, self._incoming = self._incoming.split(b"\n")
        found: list[tuple[dict[str, Any], list[int]]] = []
        for line in lines:
            message = json.loads(line)
            count = int(message.get("fds", 0))
            found.append((message, self._descriptors[:count]))
            del self._descriptors[:count]
        return found

    def send(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        """Queue a message with copies of *descriptors*."""
        own = [os.dup(one) for one in descriptors or ()]
        self._outgoing.append((json.dumps({**message, "fds": len(own)}).encode() + b"\n", own))
        self.flush()

    def flush(self) -> bool:
        """Send what can be sent now; whether all of it was."""
        while self._outgoing:
            data, descriptors = self._outgoing[0]
            try:
                sent = socket.send_fds(self.channel, [data], descriptors)
            except BlockingIOError:
                return False
            except OSError:
                return True  # its end is read soon
            for one in descriptors:
                os.close(one)
            self._outgoing[0] = (data[sent:], [])
            if sent == len(data):
                self._outgoing.popleft()
        return True

    def close(self) -> None:
        """Let go of it and of whatever was in it."""
        for _, descriptors in self._outgoing:
            self._descriptors += descriptors
        for one in self._descriptors:
            os.close(one)
        self._outgoing.clear()
        self._descriptors.clear()
        self.channel.close()


class Holder:
    """Serves one node at a time."""

    def __init__(self, state_dir: str, listening: socket.socket, first: socket.socket) -> None:
        self._note = os.path.join(state_dir, _NOTE)
        self._listening, self._held = listening, dict[str, Held]()
        self._poll = select.poll()
        self._wakeup, waker = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._poll.register(self._wakeup, select.POLLIN)
        self._poll.register(listening, select.POLLIN)
        self._link: Link | None = None
        self._alone_since = self._keeper_moved_at = now()
        self._draining: dict[int, Held] = {}
        self._meet(first)

    def run(self) -> None:
        """Until nothing is to be held any more."""
        while True:
            for descriptor, _ in self._poll.poll(None if self._link else 1000 * LOOK_SECONDS):
                if descriptor == self._wakeup:
                    self._on_signal()
                elif descriptor == self._listening.fileno():
                    self._on_visitor()
                elif self._link is not None and descriptor == self._link.channel.fileno():
                    self._on_node(self._link)
                elif (held := self._draining.get(descriptor)) is not None:
                    self._drain(held)
            if self._link is None and (why := self._over()):
                self._end(why)
                return

    # --- the node

    def _meet(self, channel: socket.socket) -> None:
        for held in self._held.values():
            held.look()
        link = self._link = Link(channel)
        self._poll.register(channel, select.POLLIN)
        programs = [
            {"id": held.name, "pid": held.pid, "start_time": held.start_time, "code": held.code}
            for held in self._held.values()
        ]
        link.send({"hello": VERSION, "pid": os.getpid(), "programs": programs})
        self._watch(link)

    def _on_visitor(self) -> None:
        try:
            channel, _ = self._listening.accept()
        except OSError:
            return
        user = os.getuid()
        if hasattr(socket, "SO_PEERCRED"):
            _, user, _ = _PEER.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if self._link is not None:
            self._on_node(self._link)  # the earlier one's end may not be read yet
        if user not in (os.getuid(), 0) or self._link is not None:
            channel.close()
            return
        self._meet(channel)

    def _on_node(self, link: Link) -> None:
        messages = link.receive()
        if messages is None:
            self._part(link)
            return
        for message, descriptors in messages:
            try:
                self._on_message(link, message, descriptors)
            finally:
                for one in descriptors:
                    with contextlib.suppress(OSError):
                        os.close(one)
        self._watch(link)

    def _watch(self, link: Link) -> None:
        self._poll.modify(link.channel, select.POLLIN if link.flush() else select.POLLIN | select.POLLOUT)

    def _part(self, link: Link) -> None:
        """There is no node any more: its programs' output is kept for the next one."""
        self._poll.unregister(link.channel)
        link.close()
        self._link = None
        self._alone_since = self._keeper_moved_at = now()
        for held in self._held.values():
            self._keep(held)

    def _keep(self, held: Held) -> None:
        held.is_taken = False
        if held.output >= 0:
            os.set_blocking(held.output, False)
            self._draining[held.output] = held
            self._poll.register(held.output, select.POLLIN)

    def _drain(self, held: Held) -> None:
        before = held.dropped
        if not held.keep_output():
            self._stop_draining(held)
        elif held.dropped > before:
            time.sleep(_REST_SECONDS)  # one that writes as fast as it can need not cost a whole processor

    def _stop_draining(self, held: Held) -> None:
        if self._draining.pop(held.output, None) is not None:
            self._poll.unregister(held.output)

    def _on_message(self, link: Link, message: dict[str, Any], descriptors: list[int]) -> None:
        match message.get("do"):
            case "spawn":
                link.send({"number": message["number"], **self._spawn(message, descriptors)})
            case "take":
                self._take(link, message["number"], self._held.get(message["id"]))
            case "forget":
                self._forget(message["id"])
            case "sync":
                link.send({"number": message["number"]})
            case "end":
                self._end("a node of another version asked for it")
                sys.exit(0)
            case _:
                link.send({"number": message.get("number", 0), "errno": errno.ENOSYS})

    def _spawn(self, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        stdin, writing, reading, *group = descriptors
        try:
            process = subprocess.Popen(
                message["argv"],
                env=message["env"],
                cwd=message["cwd"] or None,
                stdin=stdin,
                stdout=writing,
                stderr=writing,
                close_fds=True,
                start_new_session=True,
                user=message["user"],
                group=message["group"],
                extra_groups=message["groups"],
            )
        except OSError as error:
            return {"errno": error.errno}
        except (ValueError, subprocess.SubprocessError):
            return {"errno": errno.EINVAL}
        held = Held(
            message["id"], process, os.dup(reading), os.dup(group[0]) if group else -1, message["cgroup"]
        )
        self._held[held.name] = held
        return {"pid": held.pid, "start_time": held.start_time}

    def _take(self, link: Link, number: int, held: Held | None) -> None:
        if held is None:
            link.send({"number": number, "errno": errno.ESRCH})
            return
        self._stop_draining(held)
        held.is_taken = True
        output = binascii.b2a_base64(held.kept, newline=False).decode()
        descriptors = [held.output] + ([held.group] if held.group >= 0 else [])
        link.send({"number": number, "output": output, "dropped": held.dropped}, descriptors)
        held.kept.clear()
        held.dropped = 0

    def _forget(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            held.look()
            if held.code is None:
                held.kill()  # a start that was given up, and came about all the same
            self._stop_draining(held)
            held.close()

    # --- ends

    def _on_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup, 4096)
        for held in self._held.values():
            if held.look() and self._link is not None:
                self._link.send({"ended": held.name, "code": held.code})
                self._watch(self._link)

    def _over(self) -> str:
        """Why nothing is to be held any more, now that there is no node; empty while something is."""
        if not self._held:
            return "nothing is held"
        if now() - self._alone_since > AWAY_SECONDS:
            return "nobody has come"
        return "" if self._keeper_lives() else "node and keeper have ended"

    def _keeper_lives(self) -> bool:
        """Whether it runs; one that was stopped renews nothing, so what it has left must end soon."""
        try:
            with open(self._note, "rb") as file:
                note = json.loads(file.read())
            started, state = stat(int(note["pid"]))
            if started != note["start_time"] or state in "ZX":
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if state not in "Tt":
            self._keeper_moved_at = now()
        return now() - self._keeper_moved_at < STOPPED_SECONDS

    def _end(self, why: str) -> None:
        deadline, clean = now() + KILL_SECONDS, 0
        while self._held and clean < 2 and now() < deadline:
            for held in self._held.values():
                held.look()
            results = [held.kill() for held in self._held.values()]
            clean = clean + 1 if all(results) else 0
            time.sleep(0.001)
        for held in self._held.values():
            held.remove_group()
        if clean < 2 and self._held:
            sys.stderr.write(f"phalanx holder: {why}, but not all that it holds dies\n")


def _ignore(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor tells of it."""


def main() -> None:
    """``holder_process.py STATE_DIR LISTENING FIRST``: the folder, and two sockets that are open already."""
    if len(sys.argv) != 4:
        sys.exit("the holder is started by a node")
    # Not ignored: that would be inherited by every program. What the node was told to ignore stays so.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _ignore)
    signal.signal(signal.SIGCHLD, _ignore)
    listening, first = (socket.socket(fileno=int(text)) for text in sys.argv[2:])
    listening.listen(4)  # here and not by the node: whoever connects is told the pid of who has called this
    listening.setblocking(False)
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write("phalanx-holder")
    Holder(sys.argv[1], listening, first).run()


if __name__ == "__main__":
    main()
