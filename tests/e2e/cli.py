"""The command line as a process, for tests."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

CLI = (sys.executable, "-m", "phalanx.cli.main")


class Cli:
    """``phalanx`` for *platform* on the NATS server at *url*, called in *folder*."""

    def __init__(self, url: str, folder: Path, platform: str = "prod") -> None:
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PHALANX_")
        }
        self.environment |= {"PHALANX_PLATFORM": platform, "PHALANX_NATS": url}

    async def call(self, *words: str, code: int = 0, env: dict[str, str] | None = None) -> tuple[str, str]:
        """Run a command, which must end with *code*: what it printed, and its errors."""
        ended, out, err = await self.run(*words, env=env)
        assert ended == code, (words, ended, out, err)
        return out, err

    async def run(self, *words: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
        """Run a command, however it ends: its exit code, what it printed, and its errors."""
        process = await asyncio.create_subprocess_exec(
            *CLI,
            *words,
            env={**self.environment, **(env or {})},
            cwd=self.folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(60):
                out, err = (text.decode() for text in await process.communicate())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        assert "Traceback" not in err, err
        return process.returncode, out, err

    async def json(self, *words: str, code: int = 0) -> Any:
        """What it prints with --json."""
        return json.loads((await self.call(*words, "--json", code=code))[0])

    async def refused(self, *words: str, code: int = 2) -> str:
        """The one line that says what is wrong."""
        out, err = await self.call(*words, code=code)
        assert out == ""
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1, err
        return err
