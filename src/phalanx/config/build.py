"""A whole node or app, from keyword arguments; defaults and overrides from the environment."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from phalanx.config.apps import AppConfig
from phalanx.config.nats_urls import parse_urls
from phalanx.config.node import EmbeddedNats, HttpServer, NatsOptions, PlatformConfig
from phalanx.config.reader import DATABASES, Reader
from phalanx.config.rules import Whole
from phalanx.config.texts import DirectAddress, File, Label, split_address
from phalanx.errors import ConfigError
from phalanx.types import is_dns_label

VARIABLES = {
    "PHALANX_NODE": "Overrides `node`.",
    "PHALANX_DATA": "Overrides `data_dir`.",
    DATABASES: "Folder from which relative paths of databases count, so that several nodes on one host have "
    "files of their own.",
    "PHALANX_NATS": "Overrides `nats`: URLs separated by commas, or `embedded`. Other options of declared "
    "NATS servers (TLS, login) stay, unless the URLs hold a login.",
    "PHALANX_DIRECT": "Overrides `direct`: `host:port`.",
    "PHALANX_HTTP": "Overrides `http`: `host:port`, a port, or `off`.",
}
"""What the environment may override, so that one file or one program serves all nodes."""


def build_platform(
    name: object, *, environ: Mapping[str, str] | None = None, **options: object
) -> PlatformConfig:
    """A checked PlatformConfig; *options* are its fields, None means the default. Starts and creates nothing.

    The variables of :data:`VARIABLES` in *environ* (default: ``os.environ``) win over *options*.
    Raises ConfigError for the first thing that is wrong; its key names the place (``timings.ttl``).
    """
    reader = Reader()
    given = {key: value for key, value in options.items() if value is not None}
    config = read_platform(reader, {"name": name, **given}, os.environ if environ is None else environ)
    if config is None or reader.errors:
        raise reader.errors[0]
    return config


def build_app(name: object, pattern: object, **options: object) -> AppConfig:
    """A checked AppConfig; *options* are its fields, None means the default.

    Raises ConfigError for the first thing that is wrong; its key names the place
    (``apps.wiki.backend.stop_timeout``).
    """
    reader = Reader()
    given = {key: value for key, value in options.items() if value is not None}
    config = reader.app(name, {"pattern": pattern, **given})
    if config is None or reader.errors:
        raise reader.errors[0]
    return config


def read_platform(
    reader: Reader, table: Mapping[str, object], environ: Mapping[str, str]
) -> PlatformConfig | None:
    """One node from a table of its fields, with overrides and defaults. Notes errors in *reader*."""
    fields = dict(table)
    before = len(reader.errors)
    for step in (_override_names, _override_nats, _override_http, _default_node, _default_data_dir):
        try:
            step(reader, fields, environ)
        except ConfigError as error:
            reader.errors.append(error)
    config = reader.read(PlatformConfig, fields, "platform")
    return config if len(reader.errors) == before else None


# --- overrides


def _override_names(reader: Reader, fields: dict[str, object], environ: Mapping[str, str]) -> None:
    if node := environ.get("PHALANX_NODE"):
        fields["node"] = Label("a node")("PHALANX_NODE", node)
    if data := environ.get("PHALANX_DATA"):
        fields["data_dir"] = str(Path.cwd() / File()("PHALANX_DATA", data))
    if direct := environ.get("PHALANX_DIRECT"):
        fields["direct"] = DirectAddress()("PHALANX_DIRECT", direct)


def _override_nats(reader: Reader, fields: dict[str, object], environ: Mapping[str, str]) -> None:
    """What is declared is read first, so that its errors do not hide behind the override."""
    declared = reader.nats(fields.pop("nats"), "nats") if "nats" in fields else None
    if declared is not None:
        fields["nats"] = declared
    override = environ.get("PHALANX_NATS")
    if not override:
        return
    if override == "embedded":
        fields["nats"] = declared if isinstance(declared, EmbeddedNats) else EmbeddedNats()
        return
    servers = parse_urls("PHALANX_NATS", override)
    base = declared if isinstance(declared, NatsOptions) else NatsOptions()
    if servers.login:
        base = NatsOptions(
            tls_ca=base.tls_ca,
            tls_cert=base.tls_cert,
            tls_key=base.tls_key,
            tls_hostname=base.tls_hostname,
            server_name=base.server_name,
            replicas=base.replicas,
        )
    fields["nats"] = msgspec.structs.replace(base, urls=servers.urls, **servers.login)


def _override_http(reader: Reader, fields: dict[str, object], environ: Mapping[str, str]) -> None:
    override = environ.get("PHALANX_HTTP")
    if not override:
        return
    base = (reader.read(HttpServer, fields.pop("http"), "http") if "http" in fields else None) or HttpServer()
    if override == "off":
        fields["http"] = msgspec.structs.replace(base, enabled=False)
        return
    if re.fullmatch(r"[0-9]{1,9}", override, re.ASCII):
        port = Whole(0, 65535)("PHALANX_HTTP", int(override))
        fields["http"] = msgspec.structs.replace(base, port=port, enabled=True)
        return
    address = split_address(override)
    if address is None:
        raise ConfigError("PHALANX_HTTP", override, "not an address", "write host:port, a port, or off")
    fields["http"] = HttpServer(host=address[0], port=address[1])


# --- defaults


def _default_node(reader: Reader, fields: dict[str, object], environ: Mapping[str, str]) -> None:
    if "node" in fields:
        return
    fields["node"] = "unknown"
    host = socket.gethostname()
    label = re.sub(r"[^a-z0-9]+", "-", host.partition(".")[0].lower())[:63].strip("-")
    if not label:
        raise ConfigError(
            "platform.node", host, "the host's name makes no node id", "set node, or PHALANX_NODE"
        )
    fields["node"] = label


def _default_data_dir(reader: Reader, fields: dict[str, object], environ: Mapping[str, str]) -> None:
    given = fields.pop("data_dir", None)
    fields["data_dir"] = "unknown"  # until it is known; what made it so is the error
    if given is not None:
        path = File()("platform.data_dir", given)
        if not path:
            raise ConfigError("platform.data_dir", path, "empty", "write a path, or leave it out")
        fields["data_dir"] = reader.absolute(path)
        return
    name, node = fields.get("name"), fields.get("node")
    if not (isinstance(name, str) and isinstance(node, str) and is_dns_label(name) and is_dns_label(node)):
        return
    fields["data_dir"] = str(_state_home(environ) / "phalanx" / name / node)


def _state_home(environ: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib")
    state = environ.get("XDG_STATE_HOME", "")
    if state.startswith("/"):  # others are to be ignored, says the XDG base directory specification
        return Path(state)
    home = environ.get("HOME") or os.path.expanduser("~")
    if not home.startswith("/"):
        raise ConfigError(
            "platform.data_dir", home, "no home directory found", "set data_dir, or PHALANX_DATA"
        )
    return Path(home) / ".local" / "state"
