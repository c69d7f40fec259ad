"""Phalanx: high availability for ordinary programs, native to NATS.

The public names, and nothing else. They are imported on first use, so that the keeper, which lives in
this package too, stays small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phalanx.app import ActiveContext, App, AppContext, HealthChange, LeaderChange
    from phalanx.config import (
        ActivePassive,
        CommandCheck,
        Docker,
        EmbeddedNats,
        Fence,
        FunctionCheck,
        HookTimeouts,
        HttpCheck,
        HttpServer,
        Limits,
        Logging,
        NatsOptions,
        Process,
        Restart,
        Secret,
        SQLite,
        Systemd,
        TcpCheck,
        Timings,
        VirtualIP,
    )
    from phalanx.coord.codec import Entry, Removed
    from phalanx.coord.locks import Lock
    from phalanx.data.reading import StaleConnection
    from phalanx.decide.backoff import Backoff
    from phalanx.errors import (
        AddressError,
        BackendError,
        BusError,
        BusTimeout,
        BusUnavailable,
        ConfigError,
        DatabaseError,
        Fenced,
        FenceFailed,
        HookFailed,
        IdentityError,
        InternalError,
        KeyExists,
        LockLost,
        LockTimeout,
        NatsUnusable,
        NodeIdTaken,
        NotActive,
        Paused,
        PhalanxError,
        ReplicaUnavailable,
        RevisionCompacted,
        SessionLost,
        StartError,
        SyncTimeout,
        WrongRevision,
        WrongValue,
    )
    from phalanx.platform import Platform
    from phalanx.types import AppStatus, Health, Member, NodeStatus, Position, Role
    from phalanx.version import VERSION as __version__  # noqa: N811

_WHERE = {
    "phalanx.app": ("ActiveContext", "App", "AppContext", "HealthChange", "LeaderChange"),
    "phalanx.config": (
        "ActivePassive",
        "CommandCheck",
        "Docker",
        "EmbeddedNats",
        "Fence",
        "FunctionCheck",
        "HookTimeouts",
        "HttpCheck",
        "HttpServer",
        "Limits",
        "Logging",
        "NatsOptions",
        "Process",
        "Restart",
        "SQLite",
        "Secret",
        "Systemd",
        "TcpCheck",
        "Timings",
        "VirtualIP",
    ),
    "phalanx.data.reading": ("StaleConnection",),
    "phalanx.decide.backoff": ("Backoff",),
    "phalanx.errors": (
        "AddressError",
        "BackendError",
        "BusError",
        "BusTimeout",
        "BusUnavailable",
        "ConfigError",
        "DatabaseError",
        "FenceFailed",
        "Fenced",
        "HookFailed",
        "IdentityError",
        "InternalError",
        "KeyExists",
        "LockLost",
        "LockTimeout",
        "NatsUnusable",
        "NodeIdTaken",
        "NotActive",
        "Paused",
        "PhalanxError",
        "ReplicaUnavailable",
        "RevisionCompacted",
        "SessionLost",
        "StartError",
        "SyncTimeout",
        "WrongRevision",
        "WrongValue",
    ),
    "phalanx.coord.codec": ("Entry", "Removed"),
    "phalanx.coord.locks": ("Lock",),
    "phalanx.platform": ("Platform",),
    "phalanx.types": ("AppStatus", "Health", "Member", "NodeStatus", "Position", "Role"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [  # noqa: RUF022 - what a reader looks for first comes first
    "Platform",
    "App",
    "ActivePassive",
    "Process",
    "Limits",
    "Systemd",
    "Docker",
    "VirtualIP",
    "Restart",
    "Fence",
    "SQLite",
    "ActiveContext",
    "AppContext",
    "LeaderChange",
    "HealthChange",
    "HttpCheck",
    "TcpCheck",
    "CommandCheck",
    "FunctionCheck",
    "HookTimeouts",
    "Backoff",
    "Timings",
    "NatsOptions",
    "EmbeddedNats",
    "HttpServer",
    "Logging",
    "Secret",
    "Entry",
    "Removed",
    "Lock",
    "Role",
    "Health",
    "AppStatus",
    "NodeStatus",
    "Member",
    "Position",
    "PhalanxError",
    "ConfigError",
    "StartError",
    "NodeIdTaken",
    "IdentityError",
    "NatsUnusable",
    "BusError",
    "BusUnavailable",
    "BusTimeout",
    "WrongRevision",
    "WrongValue",
    "Fenced",
    "NotActive",
    "Paused",
    "SessionLost",
    "KeyExists",
    "RevisionCompacted",
    "LockTimeout",
    "LockLost",
    "HookFailed",
    "BackendError",
    "AddressError",
    "FenceFailed",
    "DatabaseError",
    "SyncTimeout",
    "ReplicaUnavailable",
    "StaleConnection",
    "InternalError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from phalanx.version import VERSION

        return VERSION
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'phalanx' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value
