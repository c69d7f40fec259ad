"""One node of ``phalanx dev``: a real ``phalanx run`` as a child process, started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.cli import exits

RESTART_SECONDS = 5.0
"""A node that died stays dead for this long, so that one can see the others take over."""

STOP_SECONDS = 30.0
KEEPER_SECONDS = 10.0
_MAX_LINE = 16 * 1024

Tell = Callable[[str, str, str], None]
"""Called with kind (``log``, ``started``, ``ended``), node, text."""


class Child:
    """One node. *env* is added to the environment; *tell* hears of all that it says and does."""

    def __init__(
        self, node: str, target: str, env: Mapping[str, str], data_dir: Path, http: str, tell: Tell
    ) -> None:
        self.node, self.data_dir, self.http = node, data_dir, http
        self._target, self._tell = target, tell
        self._env = {
            **os.environ,
            **env,
            "PHALANX_NODE": node,
            "PHALANX_DATA": str(data_dir),
            "PHALANX_HTTP": http,
            "PYTHONUNBUFFERED": "1",
        }
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int:
        """The process id; 0 while it does not run."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    async def run(self, *, restart: bool) -> int:
        """Run it until :meth:`stop`; with *restart* again when it dies. Its last exit code."""
        while True:
            code = await self._run_once()
            if self._stopping.is_set() or not restart or code == exits.BAD_INPUT:
                return code
            if await wait_at_most(self._stopping, RESTART_SECONDS):
                return code

    async def _run_once(self) -> int:
        # Imported before the fork: nothing should be imported between fork and exec.
        importlib.import_module("ctypes")
        command = [sys.executable, "-m", "phalanx.cli.main", "run", self._target]
        # A session of its own: Ctrl-C in the terminal is for `phalanx dev` alone, which then asks nicely.
        self._process = process = await asyncio.create_subprocess_exec(
            *command,
            env=self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent if system.LINUX else None,
        )
        assert process.stdout is not None
        self._tell("started", self.node, f"pid {process.pid}")
        pump = asyncio.create_task(self._pump(process.stdout), name=f"log of {self.node}")
        try:
            code = await process.wait()
            # The keeper has the same pipe: at its end the keeper, too, has finished.
            await asyncio.wait({pump}, timeout=KEEPER_SECONDS)
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            if process.returncode is None:
                process.kill()
                await process.wait()
        self._tell("ended", self.node, _how(code))
        return code

    async def _pump(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await stream.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _MAX_LINE:
                lines.append(rest)
                rest = b""
            for line in lines:
                self._tell("log", self.node, line.decode(errors="replace"))
        if rest:
            self._tell("log", self.node, rest.decode(errors="replace"))

    def stop(self) -> None:
        """Ask it to hand over and end; asking again makes it hurry. Does not wait."""
        self._stopping.set()
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once; its keeper fences what runs."""
        self._stopping.set()
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _end_with_parent() -> None:
    """In the child: hand over and end, should `phalanx dev` be killed."""
    system.set_pdeathsig(signal.SIGTERM)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
