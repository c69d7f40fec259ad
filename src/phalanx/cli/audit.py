"""``phalanx audit``: what happened, and why."""

from __future__ import annotations

import asyncio
import re
from datetime import datetime
from typing import Annotated

from cyclopts import Parameter

from phalanx import system
from phalanx.cli import exits, output
from phalanx.cli.target import Where
from phalanx.client import PlatformClient
from phalanx.errors import ConfigError
from phalanx.observe.audit import AuditEntry

_WHERE = Where()
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BAD = {"failed", "lost", "suicide", "vanished", "cut-off", "exited", "damaged", "no-session"}


def audit(
    *,
    follow: Annotated[bool, Parameter(help="Go on with new entries until Ctrl-C.")] = False,
    since: Annotated[
        str | None, Parameter(help="Only from then on: 90s, 10m, 2h, 7d, or a time like 2025-05-01T12:00.")
    ] = None,
    limit: Annotated[int, Parameter(help="The newest so many entries.")] = 100,
    where: Where = _WHERE,
    json: Annotated[bool, Parameter(help="As JSON, one object a line.")] = False,
) -> int:
    """Show what happened, and why: the audit log, oldest first."""
    if not 1 <= limit <= 1_000_000:
        raise ConfigError("--limit", limit, "out of range", "choose 1 to 1000000")
    start = moment(since, system.wall()) if since is not None else None
    platform, nats = where.find()
    client = PlatformClient(platform, nats, timeout=where.timeout)
    asyncio.run(_audit(client, start, limit, follow, json))
    return exits.OK


async def _audit(client: PlatformClient, since: float | None, limit: int, follow: bool, json: bool) -> None:
    async with client:
        entries = await client.audit(since, limit)
        for entry in entries:
            _show(entry, json)
        if not follow:
            return
        # On from the last one that was shown; what came before it in the log was shown, or is over the limit.
        last = entries[-1] if entries else None
        passed = last is None
        async for entry in client.follow_audit(last.time if last is not None else since or 0.0):
            if passed:
                _show(entry, json)
            passed = passed or (last is not None and entry.id == last.id)


def _show(entry: AuditEntry, json: bool) -> None:
    if json:
        # All fields, also those that have their default: readers need not know which may be missing.
        output.emit({field: getattr(entry, field) for field in entry.__struct_fields__})
        return
    bad = any(word in entry.action for word in _BAD)
    parts: list[str | tuple[str, str]] = [
        (output.clock(entry.time), "dim"),
        f"  {entry.node}  ",
        (entry.name, "red" if bad else "bold"),
    ]
    if entry.app:
        parts.append(f"  {entry.app}")
    if entry.epoch:
        parts.append(f" (epoch {entry.epoch})")
    if entry.duration_seconds is not None:
        parts.append(f"  {output.span(entry.duration_seconds)}")
    if entry.reason:
        parts.append(f"  {entry.reason}")
    if entry.details:
        parts.append(("  " + " ".join(f"{key}={value}" for key, value in entry.details.items()), "dim"))
    output.say(*parts)


def moment(text: str, now: float) -> float:
    """Unix seconds of ``10m`` (that long ago) or of an ISO time (local unless it says otherwise).

    Raises ConfigError.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhd])", text.strip())
    if match:
        return max(0.0, now - float(match[1]) * _UNITS[match[2]])
    try:
        return max(0.0, datetime.fromisoformat(text.strip()).timestamp())
    except (ValueError, OverflowError, OSError):
        raise ConfigError(
            "--since", text, "neither a duration nor a time", "write 90s, 10m, 2h, 7d or 2025-05-01T12:00"
        ) from None
