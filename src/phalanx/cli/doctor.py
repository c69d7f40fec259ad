"""``phalanx doctor``: what usually goes wrong, and what to do about it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated

from cyclopts import Parameter

from phalanx.cli import exits, host_checks, output
from phalanx.cli.app_checks import HOLDING, AppChecks
from phalanx.cli.findings import Check, Finding, Level, fail, run_checks, warn
from phalanx.cli.nats_checks import NatsChecks
from phalanx.cli.target import Where, nats_options
from phalanx.client import PlatformClient
from phalanx.config import EmbeddedNats, PlatformConfig
from phalanx.errors import NatsUnusable, PhalanxError
from phalanx.platform import Platform

_WHERE = Where()
_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def doctor(
    file: Annotated[str | None, Parameter(help="A phalanx.toml or module:name, as --config.")] = None,
    /,
    *,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON, one object a line.")] = False,
) -> int:
    """Check for what usually goes wrong, and say the remedy.

    It looks at this machine and at NATS; exit code 1 if anything is FAIL.
    With a file it checks the node that the file declares here: ports, folders, embedded server, programs,
    addresses, the fence command; and asks the network who else has the addresses that no node holds. It
    makes one stream, which it deletes again; nothing else is changed.
    """
    if file is not None:
        where = Where(config=file, platform=where.platform, nats=where.nats, timeout=where.timeout)
    config, platform = where.declaration()
    return asyncio.run(_doctor(config, platform, where.timeout, json))


async def _doctor(config: PlatformConfig, platform: Platform | None, timeout: float, json: bool) -> int:
    failed = False
    async for finding in _findings(config, platform, timeout):
        failed |= finding.level is Level.FAIL
        if json:
            output.emit(finding)
        else:
            _show(finding)
    return exits.NO if failed else exits.OK


async def _findings(
    config: PlatformConfig, platform: Platform | None, timeout: float
) -> AsyncIterator[Finding]:
    async for finding in run_checks(_host(config, declared=platform is not None)):
        yield finding
    apps = AppChecks(platform) if platform is not None else None
    if apps is not None:
        async for finding in run_checks([("apps", apps.programs), ("fence", apps.fence)]):
            yield finding
    held: set[str] = set()
    async for finding in _of_nats(config, timeout, held, declared=platform is not None):
        yield finding
    if apps is not None:
        # Last, as only NATS tells which of them a node holds, whose answer is as it should be.
        async for finding in run_checks([("addresses", lambda: apps.claims(held))]):
            yield finding


async def _of_nats(
    config: PlatformConfig, timeout: float, held: set[str], *, declared: bool
) -> AsyncIterator[Finding]:
    """*held* gets the apps that some node holds."""
    client = PlatformClient(config.name, nats_options(config), timeout=timeout)
    try:
        await client.__aenter__()
    except NatsUnusable as error:
        if declared and isinstance(config.nats, EmbeddedNats):
            yield warn("nats", error.problem, "its server is embedded: start this node, then look again")
        else:
            yield fail("nats", error.problem, error.remedy)
        return
    try:
        async for finding in run_checks(NatsChecks(client, config).all()):
            yield finding
            if finding.check == "jetstream" and finding.level is Level.FAIL:
                return  # nothing of the rest could work
        with contextlib.suppress(PhalanxError):  # said above
            held |= {
                app.name for status in await client.status() for app in status.apps if app.role in HOLDING
            }
    finally:
        await client.__aexit__(None, None, None)


def _host(config: PlatformConfig, *, declared: bool) -> list[tuple[str, Check]]:
    checks: list[tuple[str, Check]] = [
        ("python", host_checks.python),
        ("keeper", host_checks.keeper),
        ("open-files", host_checks.open_files),
        ("nats-server", lambda: host_checks.server_program(config)),
    ]
    if declared:
        checks += [
            ("data-dir", lambda: host_checks.data_dir(config)),
            ("http", lambda: host_checks.http_port(config)),
            ("embedded-nats", lambda: host_checks.embedded_ports(config)),
        ]
    return checks


def _show(finding: Finding) -> None:
    output.say(
        (f"{finding.level.upper():<4}", _STYLES[finding.level]), f"  {finding.check:<13}  {finding.text}"
    )
    if finding.remedy:
        output.say(f"      {'':<13}  → {finding.remedy}")
