"""A tiny process beside each keeper, for the case that node and keeper are killed at once.

Then nobody would be left who could end what the node had running until the node is started again, while
another node takes over after the TTL. The warden waits for the end of a socket whose other end only the
keeper has. An end without a goodbye means that the keeper died: the warden kills whatever
``registered.json`` names, by the keeper's own code, and exits. If only the keeper dies, the node ends its
sections itself, as its session is lost: both kill the same things, which does no harm.

While there is no node (it was killed, or is away in a pause) nobody but the warden would notice a keeper that
stands still: it renews nothing, and would end nothing. Such a keeper is killed, and then it is as above.

It is forked before the keeper starts its event loop and any thread, so it costs neither start-up time nor,
as all of its memory is shared, much of that.

The invariant: nothing of a later life of the node is killed. Keeper and warden hold a lock on
``warden.lock`` together (one open file, handed over the socket), from before the first thing is registered
until all that was is gone; the keeper of a later life starts nothing before it has the lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from phalanx import system
from phalanx.keeper import fencing
from phalanx.keeper.hardening import harden, ignore_signals, log_without_waiting

log = logging.getLogger("phalanx.keeper")

NAME = "phalanx-warden"
"""Its name in ps and top: what the kernel has in /proc/<pid>/comm, 15 bytes at most."""

GIVE_UP_SECONDS = 30.0
"""What has not died by then is left to the next keeper; a host where nothing dies is no warden's business."""

LOCK_WAIT_SECONDS = 4.0
"""How long a keeper waits for what an earlier life has left behind before it tells its node to try again."""

LOCK_PATIENCE_SECONDS = 1.0
"""After this long a keeper of an earlier life that still has the lock is killed: its node is gone, as ours
has the data directory. Then its warden ends what it has kept."""

RESPAWN_SECONDS = 1.0
"""Between a warden's death and the start of the next one."""

LOOK_SECONDS = 0.1
"""Between looks at the keeper while there is no node."""

STOPPED_LOOKS = 5
"""A keeper that stands still at so many of them in a row is as good as dead. With the renewal before, that is
still within the shortest session (1 s). Looks, not seconds: what was stopped along with the warden, and wakes
with it, has as much time again."""

_LOCK_POLL_SECONDS = 0.02
_EXIT_SECONDS = 0.05
_GOODBYE = b"goodbye\n"
_MAX_BYTES = 16384


class Warden:
    """The keeper's side of its warden."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self._channel = channel
        self._dismissed = False
        self._watched = False

    @classmethod
    def fork(cls) -> Warden:
        """For a process with one thread and no event loop. It keeps no descriptor but standard error."""
        mine, theirs = socket.socketpair()
        gc.freeze()  # its collector would copy every page that it looks at
        pid = os.fork()
        if pid == 0:
            _begin(theirs.detach())
        theirs.close()
        return cls(pid, mine)

    @classmethod
    def spawn(cls) -> Warden:
        """The same at any time: a new interpreter. Blocks until its exec. Raises OSError."""
        mine, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "phalanx.keeper.warden", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError:
                mine.close()
                raise
        warden = cls(process.pid, mine)
        process.returncode = 0  # it is waited for in :meth:`reap`, as a forked one
        return warden

    def tell(
        self, state_dir: Path, lock: system.FileLock | None, node: system.ProcessRef | None = None
    ) -> None:
        """From now on it kills what ``registered.json`` in *state_dir* names if this process dies, or stands
        still without *node* (None: there is none now); it holds *lock* as well.

        Raises OSError if it is dead.
        """
        message = json.dumps({"state_dir": str(state_dir.absolute()), "node": node}).encode() + b"\n"
        descriptors = [lock.fileno()] if lock is not None else []
        socket.send_fds(self._channel, [message], descriptors)

    def watch(self, on_death: Callable[[], None]) -> None:
        """Call *on_death* once, from the running loop, when it ends unasked."""
        loop = asyncio.get_running_loop()

        def readable() -> None:
            loop.remove_reader(self._channel.fileno())
            self._watched = False
            if not self._dismissed:
                on_death()

        loop.add_reader(self._channel.fileno(), readable)
        self._watched = True

    def goodbye(self) -> None:
        """Dismiss it: nothing is left that it would have to end. Twice is harmless."""
        if self._dismissed:
            return
        self._dismissed = True
        if self._watched:
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
        with contextlib.suppress(OSError):
            self._channel.sendall(_GOODBYE)
        self._channel.close()

    def reap(self) -> str:
        """Let go of one that has died; how it ended."""
        self._channel.close()
        deadline = system.now() + _EXIT_SECONDS
        try:
            # A process that dies closes what it has open a moment before it can be waited for.
            while (found := os.waitpid(self.pid, os.WNOHANG))[0] == 0 and system.now() < deadline:
                time.sleep(0.001)
        except ChildProcessError:
            return "it is gone"
        pid, status = found
        if pid == 0:
            return "it does not quite end"
        code = os.waitstatus_to_exitcode(status)
        return f"killed by signal {-code}" if code < 0 else f"exited with code {code}"


async def take_lock(state_dir: Path) -> system.FileLock | None:
    """The lock that says: nobody of an earlier life of this node kills anything any more.

    Raises TimeoutError, which names the holder, when it is not free in time. None where it can't be had at
    all (a full or read-only disk): nothing can be registered there either.
    """
    path = state_dir / "warden.lock"
    began = system.now()
    while True:
        try:
            return system.lock_file(path)
        except BlockingIOError as error:
            waited = system.now() - began
            if waited > LOCK_WAIT_SECONDS:
                raise TimeoutError(f"{path} is {error.strerror}") from None
            if waited > LOCK_PATIENCE_SECONDS:
                _kill_old_keeper(path)
        except OSError as error:
            log.error("%s: %s", path, error.strerror)
            return None
        await asyncio.sleep(_LOCK_POLL_SECONDS)


def _kill_old_keeper(path: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        pid = int(path.read_text())
        # Who wrote its pid may be dead, its warden at work, and the pid by now that of another node's keeper.
        if pid != os.getpid() and "phalanx.keeper" in system.command_line(pid) and _has_open(pid, path):
            log.warning("killing the keeper of an earlier life, process %d, which does not end", pid)
            os.kill(pid, signal.SIGKILL)


def _has_open(pid: int, path: Path) -> bool:
    """Raises OSError if it cannot be seen, or is gone. True where nobody can tell (macOS)."""
    if not system.LINUX:
        return True
    wanted, folder = path.stat(), Path(f"/proc/{pid}/fd")
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.path.samestat((folder / name).stat(), wanted):
                return True
    return False


# --- the warden's own process


def _begin(descriptor: int) -> NoReturn:
    """In the forked child: become a warden, and never return."""
    code = 1
    try:
        os.setsid()
        gc.disable()
        # Above all the node's channel: as long as anybody has it open, the node does not see its keeper die.
        os.closerange(3, descriptor)
        os.closerange(descriptor + 1, 1 << 20)
        _name()
        _serve(socket.socket(fileno=descriptor))
        code = 0
    except BaseException as error:  # nothing of the keeper's may run in this process
        log.critical("the warden failed", exc_info=error)
    finally:
        os._exit(code)


def _name() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(NAME)


def _serve(channel: socket.socket) -> None:
    """Wait until the keeper says goodbye, or is gone. Then what it has told of is killed."""
    received, descriptors = b"", list[int]()
    watch = _Watch(channel)
    while not received.endswith(_GOODBYE):
        watch.wait()
        try:
            data, new, _, _ = socket.recv_fds(channel, _MAX_BYTES, 1)
        except ConnectionResetError:
            data, new = b"", list[int]()
        descriptors += new  # the lock, held by having it open
        if not data:
            _keeper_died(received)
            return
        received += data
        if received.endswith(b"\n") and not received.endswith(_GOODBYE):
            watch.on_node(_last(received)["node"])


class _Watch:
    """Waits for *channel*, and has an eye on the keeper, our parent, while there is no node."""

    def __init__(self, channel: socket.socket) -> None:
        self._keeper, self._channel = os.getppid(), channel.fileno()
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._node: int | None = None
        """Its descriptor, readable once it has ended."""
        self._is_away, self._stopped_looks = False, 0

    def on_node(self, node: list[int] | None) -> None:
        """From now on there is that one, pid and start time; or none."""
        self._forget_node()
        self._is_away, self._stopped_looks = True, 0
        if node is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._node = system.open_pidfd(node[0])
            if self._node is not None:
                self._poll.register(self._node, select.POLLIN)
            self._is_away = not system.ProcessRef(*node).alive()

    def _forget_node(self) -> None:
        if self._node is not None:
            self._poll.unregister(self._node)
            os.close(self._node)
            self._node = None

    def wait(self) -> None:
        """Return when there is something to be received, or the end."""
        while True:
            ready = [number for number, _ in self._poll.poll(1000 * LOOK_SECONDS if self._is_away else None)]
            if self._channel in ready:
                return
            if ready:
                self._forget_node()
                self._is_away = True
            else:
                self._look()

    def _look(self) -> None:
        self._stopped_looks = self._stopped_looks + 1 if system.is_stopped(self._keeper) else 0
        if self._stopped_looks >= STOPPED_LOOKS and os.getppid() == self._keeper:
            log.error("there is no node, and the keeper, process %d, stands still: killing it", self._keeper)
            os.kill(self._keeper, signal.SIGKILL)  # its end is the channel's


def _last(received: bytes) -> dict[str, Any]:
    return json.loads(received.splitlines()[-1])


def _keeper_died(received: bytes) -> None:
    if not received.endswith(b"\n"):
        return  # it died before it had registered anything
    state_dir = Path(_last(received)["state_dir"])
    began = system.now()
    try:
        left = fencing.Registry(state_dir).left_over()
    except fencing.LeftOversUnknown as error:
        log.critical("the keeper died: %s", error)
        return
    log.error("the keeper died: killing what it has kept: %s", ", ".join(r.id for r in left) or "nothing")
    if asyncio.run(_kill(left, began + GIVE_UP_SECONDS)):
        log.warning("all of it is gone after %.0f ms", 1000 * (system.now() - began))
    else:
        log.critical("not all of it is gone after %g s; the node kills it when it starts", GIVE_UP_SECONDS)


async def _kill(resources: list[fencing.Resource], deadline: float) -> bool:
    while not await fencing.kill_resources(resources):
        if system.now() > deadline:
            return False
    return True


def main() -> None:
    """``python -m phalanx.keeper.warden FD``: started by a keeper whose first warden has died."""
    if len(sys.argv) != 2:
        sys.exit("phalanx.keeper.warden is started by a keeper: python -m phalanx.keeper.warden FD")
    ignore_signals()
    log_without_waiting()
    harden()
    _name()
    _serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
