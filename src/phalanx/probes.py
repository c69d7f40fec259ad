"""Runs one health check once: HTTP, TCP, a command, a Python function.

Used by the health monitor, and by backends that wait until their program is ready.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import inspect
import os
import signal
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from urllib.parse import SplitResult, quote, unquote, urlsplit

from phalanx import child, system
from phalanx.config import Check, CommandCheck, FunctionCheck, HttpCheck, TcpCheck
from phalanx.config.texts import split_address

CANCEL_GRACE_SECONDS = 0.1
"""A run that is out of time gets that long to clean up before the monitor goes on without it."""
MAX_DETAIL = 200

_MAX_HEAD_BYTES = 16384
_MAX_BODY_BYTES = 65536
_BODY_SECONDS = 0.05
_URL_SAFE = "/?%:@!$&'()*+,;=~-._"


class CheckFailed(Exception):
    """A check did not pass. ``detail`` is one line: what was seen instead."""

    def __init__(self, detail: str) -> None:
        self.detail = _one_line(detail)
        super().__init__(self.detail)


def _one_line(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text[: 2 * MAX_DETAIL]).strip()
    return text if len(text) <= MAX_DETAIL else f"{text[: MAX_DETAIL - 1]}…"


async def run_check(check: Check) -> str:
    """Run *check* once, within its timeout. Returns what was seen; raises CheckFailed(detail).

    Whoever runs a check again and again uses one :class:`Probe`, whose runs never overlap.
    """
    return await Probe(check).run()


class Probe:
    """One check, to be run many times. Its runs never overlap, not even one that ignores cancellation."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self._left: asyncio.Task[str] | None = None
        self._left_since = 0.0

    async def run(self) -> str:
        """Run it once: what was seen, as one line. Raises CheckFailed(detail), also when out of time."""
        if self._left is not None and not self._left.done():
            seconds = system.now() - self._left_since
            raise CheckFailed(f"its last run has not ended, {seconds:.1f} s after it began")
        began, timeout = system.now(), self.check.timeout
        task = asyncio.create_task(_attempt(self.check), name=f"check {self.check.name}")
        self._left, self._left_since = task, began
        task.add_done_callback(_seen)
        in_time = False
        try:
            done, _ = await asyncio.wait({task}, timeout=timeout)
            in_time = bool(done)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=CANCEL_GRACE_SECONDS)
        if not in_time or task.cancelled():
            raise CheckFailed(f"no result within {timeout:g} s" if not in_time else "it was cancelled")
        return _one_line(task.result())

    async def wait_ended(self) -> None:
        """Give a run that was just cancelled its time to clean up."""
        if self._left is not None and not self._left.done():
            await asyncio.wait({self._left}, timeout=2 * CANCEL_GRACE_SECONDS)


def _seen(task: asyncio.Task[str]) -> None:
    """The outcome of a run that was given up is no news."""
    if not task.cancelled():
        task.exception()


async def _attempt(check: Check) -> str:
    match check:
        case HttpCheck():
            return await _http(check)
        case TcpCheck():
            return await _tcp(check)
        case CommandCheck():
            return await _command(check)
        case FunctionCheck():
            return await _function(check)


# --- connections


@contextlib.asynccontextmanager
async def _connected(
    host: str, port: int, *, tls: ssl.SSLContext | None = None
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter], None]:
    """A connection that is closed without waiting for the other side. Raises CheckFailed."""
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=_MAX_HEAD_BYTES)
    except (OSError, UnicodeError) as error:
        raise CheckFailed(f"cannot connect to {host} port {port}: {_words(error)}") from None
    try:
        yield reader, writer
    except OSError as error:
        raise CheckFailed(f"connection to {host} port {port} broke: {_words(error)}") from None
    finally:
        # TLS would wait for the peer's goodbye, which a hanging peer never says.
        writer.transport.abort() if tls is not None else writer.close()


def _words(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    # What asyncio puts into strerror repeats the address; names that can't be resolved have negative numbers.
    return os.strerror(number) if number is not None and number > 0 else str(error)


async def _tcp(check: TcpCheck) -> str:
    target = split_address(check.address)
    assert target is not None, "checked with the configuration"
    async with _connected(*target):
        return "connected"


@functools.lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # loads all authorities: some 20 ms, once


async def _http(check: HttpCheck) -> str:
    url = urlsplit(check.url)
    port = url.port or (443 if url.scheme == "https" else 80)
    async with _connected(url.hostname or "", port, tls=_tls() if url.scheme == "https" else None) as (r, w):
        w.write(_request(url))
        status = await _status(r)
        await _read_politely(r)
    lowest, highest = check.expect
    if not lowest <= status <= highest:
        raise CheckFailed(f"HTTP {status}, expected {lowest} to {highest}")
    return f"HTTP {status}"


def _request(url: SplitResult) -> bytes:
    path = quote(url.path or "/", safe=_URL_SAFE)
    query = f"?{quote(url.query, safe=_URL_SAFE)}" if url.query else ""
    lines = [
        f"GET {path}{query} HTTP/1.1",
        f"Host: {url.netloc.rpartition('@')[2]}",
        "User-Agent: phalanx",
        "Accept: */*",
        "Connection: close",
    ]
    if url.username is not None:
        login = f"{unquote(url.username)}:{unquote(url.password or '')}"
        lines.append(f"Authorization: Basic {base64.b64encode(login.encode()).decode()}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _status(reader: asyncio.StreamReader) -> int:
    """The status of the final answer; interim ones (1xx) are passed over. Raises CheckFailed."""
    for _ in range(8):
        line = await _line(reader)
        version, _, rest = line.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            shown = line.strip().decode(errors="replace")
            raise CheckFailed(f"no HTTP answer: {shown!r}" if shown else "closed without an answer")
        status = int(rest[:3])
        if status >= 200:
            return status
        while (await _line(reader)).strip():
            pass
    raise CheckFailed("interim answers only")


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ValueError:
        raise CheckFailed(f"no HTTP answer: a line of more than {_MAX_HEAD_BYTES} bytes") from None


async def _read_politely(reader: asyncio.StreamReader) -> None:
    """Take a short body, so that the server sees no reset. The verdict is known: an error here is none."""
    left = _MAX_BODY_BYTES
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(_BODY_SECONDS):
            while left > 0 and (data := await reader.read(left)):
                left -= len(data)


# --- commands and functions


async def _command(check: CommandCheck) -> str:
    return await run_program(check.command, lambda _: None)


async def run_program(command: Sequence[str], on_line: Callable[[str], None], *, marker: str = "") -> str:
    """Run *command* to its end; the last line that it wrote, or how it ended. *on_line* gets each line.

    When this is cancelled, it and what is left of its process group is killed. *marker*: by which the keeper
    can find it and its children; then the kernel ends it with this process, too. Raises CheckFailed unless it
    ends with 0.
    """
    programs: list[child.Child] = []

    async def start() -> None:
        env = child.environment() | ({system.MARKER_ENV: marker} if marker else {})
        whole = (*child.dies_with_node(), *command) if marker else command
        popen = await child.in_thread(lambda: child.spawn(whole, env=env))
        programs.append(child.Child(popen, on_line))

    try:
        # To its end even if cancelled: a program that nobody knows of could not be killed.
        await child.finish(asyncio.create_task(start()))
        program = programs[0]
        await program.exited.wait()
    except OSError as error:
        raise CheckFailed(f"cannot run {command[0]}: {_words(error)}") from None
    finally:
        for one in programs:
            # What it left in the background goes with it. Not yet reaped, so the group is still its own.
            one.signal_group(signal.SIGKILL)
            try:
                await child.finish(asyncio.create_task(one.exited.wait()))
            finally:
                one.reap()  # also when this is cancelled a second time
    last_line = program.output.last_line
    if program.code != 0:
        raise CheckFailed(f"{program.how}: {last_line}" if last_line else program.how)
    return last_line or program.how


async def _function(check: FunctionCheck) -> str:
    try:
        result = check.function()
        if inspect.isawaitable(result):
            result = await result
    except (Exception, SystemExit) as error:  # SystemExit would end the node
        raise CheckFailed(
            f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        ) from error
    if result is False:
        raise CheckFailed("returned False")
    return result if isinstance(result, str) else ""
