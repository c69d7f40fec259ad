"""Commands that work on temporary files, ended by a signal while they do."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.e2e.cli import CLI, Cli
from tests.e2e.site import Site
from tests.e2e.wal import APP, NAMES, connected, make_log

from phalanx.bus.provision import bucket_config, create_stream
from phalanx.cli import exits
from phalanx.testing.nats import NatsServer


@pytest.fixture
async def cli(tmp_path: Path, nats_server: NatsServer) -> AsyncIterator[Cli]:
    """Of a platform that is down, with an app that has a snapshot of 24 MB."""
    async with connected(nats_server.url()) as bus:
        bucket = NAMES.platform_bucket
        await create_stream(bus, bucket_config(NAMES, bucket, None, history=4, replicas=1))
        await bus.write(NAMES.key_subject(bucket, NAMES.app_key(APP)), b"{}")
        await bus.write(NAMES.key_subject(bucket, NAMES.database_key(APP)), b"{}")
        (tmp_path / "site").mkdir()
        (tmp_path / "here").mkdir()
        with closing(Site(tmp_path / "site", bus, await make_log(bus), 4096)) as site:
            await site.begin(7)
            await site.commit(rows=400, size=60_000)
            await site.snapshots.create(site.source)
        made = Cli(nats_server.url(), tmp_path / "here")
        made.environment["TMPDIR"] = str(made.folder)
        yield made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("words", [("verify", APP), ("restore", APP, "--to", "restored.db")])
async def test_command_that_is_ended_leaves_nothing_temporary(
    cli: Cli, words: tuple[str, ...], number: signal.Signals
) -> None:
    """What it has unpacked so far goes, whichever signal it is."""
    process = await asyncio.create_subprocess_exec(
        *CLI,
        "snapshot",
        *words,
        env=cli.environment,
        cwd=cli.folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(30):
            while not any(path.is_file() for path in cli.folder.rglob("*")):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            process.send_signal(number)
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    expected = exits.INTERRUPTED if number is signal.SIGINT else exits.TERMINATED
    assert (process.returncode, list(cli.folder.iterdir())) == (expected, []), errors.decode()
