"""Declarations of a platform and its apps: in Python, or in ``phalanx.toml``. Frozen, checked once.

``apps``, ``databases`` and ``node`` say what there is, ``rules`` and ``texts`` what one value may be,
``relations`` what must fit together; ``reader`` checks whole declarations, ``build`` those made in Python,
``toml`` files; ``reference`` writes docs/configuration.md.
"""

from phalanx.config.app_relations import between_apps, with_platform
from phalanx.config.apps import ActivePassive, AppConfig, HookTimeouts, Restart
from phalanx.config.backends import Backend, Docker, Limits, Process, Systemd
from phalanx.config.build import build_app, build_platform
from phalanx.config.checks import Check, CheckSettings, CommandCheck, FunctionCheck, HttpCheck, TcpCheck
from phalanx.config.databases import SQLite
from phalanx.config.events import Events
from phalanx.config.node import EmbeddedNats, Fence, HttpServer, Logging, NatsOptions, PlatformConfig, Timings
from phalanx.config.patterns import Pool, Ring
from phalanx.config.redact import redacted
from phalanx.config.secret import Secret, hide_secrets, restore_secrets, reveal_secrets
from phalanx.config.toml import check_toml, load_toml
from phalanx.config.vip import VirtualIP

__all__ = [
    "ActivePassive",
    "AppConfig",
    "Backend",
    "Check",
    "CheckSettings",
    "CommandCheck",
    "Docker",
    "EmbeddedNats",
    "Events",
    "Fence",
    "FunctionCheck",
    "HookTimeouts",
    "HttpCheck",
    "HttpServer",
    "Limits",
    "Logging",
    "NatsOptions",
    "PlatformConfig",
    "Pool",
    "Process",
    "Restart",
    "Ring",
    "SQLite",
    "Secret",
    "Systemd",
    "TcpCheck",
    "Timings",
    "VirtualIP",
    "between_apps",
    "build_app",
    "build_platform",
    "check_toml",
    "hide_secrets",
    "load_toml",
    "redacted",
    "restore_secrets",
    "reveal_secrets",
    "with_platform",
]
