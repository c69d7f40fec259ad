"""Declarations of a platform and its apps: in Python, or in ``phalanx.toml``. Frozen, checked once.

``declarations`` says what there is; ``rules`` what one value may be; ``validate`` checks whole
declarations and their relations; ``toml`` reads files; ``reference`` writes docs/configuration.md.
"""

from phalanx.config.declarations import (
    ActivePassive,
    AppConfig,
    Backend,
    Check,
    CheckSettings,
    CommandCheck,
    EmbeddedNats,
    FunctionCheck,
    HookTimeouts,
    HttpCheck,
    HttpServer,
    Logging,
    NatsOptions,
    PlatformConfig,
    Process,
    TcpCheck,
    Timings,
)
from phalanx.config.secret import Secret, hide_secrets, restore_secrets, reveal_secrets

__all__ = [
    "ActivePassive",
    "AppConfig",
    "Backend",
    "Check",
    "CheckSettings",
    "CommandCheck",
    "EmbeddedNats",
    "FunctionCheck",
    "HookTimeouts",
    "HttpCheck",
    "HttpServer",
    "Logging",
    "NatsOptions",
    "PlatformConfig",
    "Process",
    "Secret",
    "TcpCheck",
    "Timings",
    "hide_secrets",
    "restore_secrets",
    "reveal_secrets",
]
