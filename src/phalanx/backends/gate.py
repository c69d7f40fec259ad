"""A program that is started, but does not run before it is let in.

Between fork and exec a child is a copy of its node: without the mark, in no group that anybody knows. If
the node is killed just then its keeper finds nothing, and the child would go on to become the program. So
what is started is a gate, which waits on its stdin for a line and only then becomes the program. The
line is sent once the keeper knows the group; the end of the node is the end of the stdin, and of the gate.

The gate is a shell, which costs a millisecond. Where a shell would spoil something (it drops variables
whose names are none for it, and takes any file for a script) it is a Python, which costs some twenty.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

from phalanx import child
from phalanx.backends.held import HeldProcess

# The shell's own PWD, OLDPWD, SHLVL and _ reach the program as from any shell.
_SHELL_GATE = 'read -r _ && exec "$0" "$@" </dev/null'

_PYTHON_GATE = """
import os, signal, sys
channel = os.dup(0)
if os.read(0, 1):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # As if Python had not been here: what it ignores, and the locale that it may have set (PEP 538).
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.environ.pop("LC_CTYPE", None)
    if sys.argv[1].startswith("="):
        os.environ["LC_CTYPE"] = sys.argv[1][1:]
    try:
        os.execv(sys.argv[2], sys.argv[2:])
    except OSError as error:
        os.write(channel, b"%d" % error.errno)
os._exit(127)
"""

_SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Some shells keep these for themselves.
_SHELL_VARIABLES = frozenset({"BASHOPTS", "EUID", "IFS", "OPTIND", "PPID", "SHELLOPTS", "UID"})


class Gate:
    """What holds one program back."""

    def __init__(self, channel: socket.socket | None, *, reports: bool = False) -> None:
        self._channel, self._reports = channel, reports
        self._opening = False

    def open(self) -> None:
        """Let the program run. Blocks, where the gate reports: until its exec.

        Raises OSError if the kernel refuses to run it. One that has ended meanwhile is no error here.
        """
        self._opening = True
        if self._channel is None:
            return
        refused = b""
        with self._channel as channel:
            try:
                channel.sendall(b"\n")
                refused = channel.recv(16) if self._reports else b""
            except (BrokenPipeError, ConnectionResetError):
                return
        if refused:
            raise OSError(int(refused), os.strerror(int(refused)))

    def close(self) -> None:
        """Never let it run: the gate ends. Nothing once :meth:`open` was called; twice is harmless."""
        if self._channel is not None and not self._opening:
            self._channel.close()


def spawn(
    command: tuple[str, ...], *, env: Mapping[str, str], cwd: str, identity: child.Identity | None
) -> tuple[subprocess.Popen[bytes], Gate]:
    """Start *command* (its first is a whole path) behind a gate. Blocks; raises OSError.

    Where there is neither a shell nor a Python that the program's user may run, there is no gate: the
    program runs at once.
    """
    for wrapped, reports in _wrapped(command, env, identity):
        with _channel() as (ours, theirs):
            process = child.spawn(wrapped, env=env, cwd=cwd, identity=identity, stdin=theirs.fileno())
            return process, Gate(ours, reports=reports)
    return child.spawn(command, env=env, cwd=cwd, identity=identity), Gate(None)


async def spawn_by(
    start: Callable[[Sequence[str], int], Awaitable[HeldProcess]],
    command: tuple[str, ...],
    env: Mapping[str, str],
    identity: child.Identity | None,
) -> tuple[HeldProcess, Gate]:
    """The same by somebody else, who does not keep our end of the gate: *start* is given what to run, and the
    descriptor that is to be its stdin. Raises OSError."""
    wrappings = await child.in_thread(lambda: list(_wrapped(command, env, identity)))
    for wrapped, reports in wrappings:
        with _channel() as (ours, theirs):
            return await start(wrapped, theirs.fileno()), Gate(ours, reports=reports)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return await start(command, nothing), Gate(None)
    finally:
        os.close(nothing)


@contextmanager
def _channel() -> Generator[tuple[socket.socket, socket.socket]]:
    """Our end of a gate, and its own, which is closed afterwards; ours only if the gate does not start.

    A gate that is not for this user is no error, or else something is wrong with cwd: the next one will tell.
    """
    ours, theirs = socket.socketpair()
    try:
        yield ours, theirs
    except BaseException as error:
        ours.close()
        if not isinstance(error, OSError) or error.errno not in (errno.ENOENT, errno.EACCES):
            raise
    finally:
        theirs.close()


def _wrapped(
    command: tuple[str, ...], env: Mapping[str, str], identity: child.Identity | None
) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The possible gates, best first; and whether each reports a failed exec."""
    # A node that dies before setpriv has set that is one whose gate never opens.
    is_sure, dies = _is_sure_to_run(command[0]), child.dies_with_node()
    if is_sure and _shell() and all(map(_passes_a_shell, env)):
        yield (*dies, _shell(), "-c", _SHELL_GATE, *command), False
    python = (sys.executable, "-I", "-S", "-c", _PYTHON_GATE)
    locale = "=" + env["LC_CTYPE"] if "LC_CTYPE" in env else "-"
    if identity is None:
        yield (*dies, *python, locale, *command), True
    else:
        # First of all the Python, so that we hear of it if that user may not run it.
        yield (*python, locale, *(dies if is_sure else ()), *command), True


def _passes_a_shell(name: str) -> bool:
    return _SHELL_NAME.fullmatch(name) is not None and name not in _SHELL_VARIABLES


@cache
def _shell() -> str:
    return shutil.which("sh", path="/bin:/usr/bin") or ""


def _is_sure_to_run(program: str) -> bool:
    """Whether the kernel knows what to do with the file; otherwise its own error is the better message."""
    try:
        with open(program, "rb") as file:
            head = file.read(256)
    except OSError:
        return False
    if head.startswith(b"#!"):
        interpreter = head[2:].split(b"\n")[0].split()
        return bool(interpreter) and os.access(interpreter[0], os.X_OK)
    return head.startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe"))  # Linux; macOS
