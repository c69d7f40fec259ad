"""Who calls from outside of the nodes, and the audit entry of what he has changed."""

from __future__ import annotations

import getpass
import os
import secrets
import socket

import msgspec

from phalanx import system
from phalanx.names import Names
from phalanx.observe.audit import AuditEntry
from phalanx.ports import Bus


def caller() -> str:
    """Who asks, for the audit log: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


async def record(
    bus: Bus, names: Names, action: str, *, app: str = "", reason: str = "", details: dict[str, str]
) -> None:
    """Put what the caller has done into the audit log. Raises BusError."""
    entry = AuditEntry(
        id=f"{action}-{secrets.token_hex(8)}",
        time=round(system.wall(), 6),
        node=caller(),
        category="app" if app else "platform",
        action=action,
        app=app,
        reason=reason,
        details={"by": caller(), **details},
    )
    subject = names.audit_subject(entry.category, entry.action)
    await bus.write(subject, msgspec.json.encode(entry), headers={"Nats-Msg-Id": entry.id})


__all__ = ["caller", "record"]
