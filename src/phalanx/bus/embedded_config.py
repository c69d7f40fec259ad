"""From the declaration of an embedded server to nats-server's configuration.

Format: https://docs.nats.io/running-a-nats-service/configuration
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from phalanx.config import EmbeddedNats
from phalanx.config.reader import Reader
from phalanx.errors import ConfigError

KEY = "nats.embedded"
"""Where the declaration stands in phalanx.toml, for the keys of errors."""

ROUTE_USER = "route"
"""The user of the routes; its password is the declaration's ``route_secret``."""

LAME_DUCK_GRACE_SECONDS = 0.2
"""How long a server that steps aside keeps its clients before it closes them one by one."""


def checked(config: EmbeddedNats) -> EmbeddedNats:
    """*config* as config's own rules read it: a declaration that was built by hand has met none of them.

    Raises ConfigError for the first thing that is wrong, or would leave the server open to strangers.
    """
    reader = Reader()
    result = reader.read(EmbeddedNats, config, KEY)
    if result is None:
        raise reader.errors[0]
    return result


def render(config: EmbeddedNats, platform: str, node: str, directory: Path) -> str:
    """The configuration file of this node's server. *directory* is ``<data_dir>/nats``, absolute."""
    listen = bracketed(config.host)
    lines = [
        f"server_name: {_quoted(name_of(config, platform, node))}",
        f"listen: {_quoted(f'{listen}:{config.port}')}",
        f"pid_file: {_quoted(str(directory / 'nats.pid'))}",
        f"log_file: {_quoted(str(directory / 'nats.log'))}",
        "logfile_size_limit: 10MB",
        "logfile_max_num: 3",
        f'lame_duck_grace_period: "{int(LAME_DUCK_GRACE_SECONDS * 1000)}ms"',
        'lame_duck_duration: "30s"',  # the shortest that nats-server accepts
        *_jetstream(config, directory),
        *_authorization(config),
        *_tls(config, ""),
    ]
    if config.monitor_port:
        lines.append(f"http: {_quoted(f'{listen}:{config.monitor_port}')}")
    if config.routes:
        lines += _cluster(config, platform)
    return "\n".join([*lines, ""])


def name_of(config: EmbeddedNats, platform: str, node: str) -> str:
    """The server's name in the cluster: as declared, or ``<platform>-<node>``."""
    return config.server_name or f"{platform}-{node}"


def local_host(config: EmbeddedNats) -> str:
    """The address by which this machine reaches its own server."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)


def cluster_size(config: EmbeddedNats) -> int:
    """How many servers the cluster has, whether or not the routes name this one too; 1 without routes."""
    own = f"{bracketed(config.host)}:{config.cluster_port}"
    return len({*config.routes} - {own}) + 1


def bracketed(host: str) -> str:
    """*host* as it stands before a port: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


# --- blocks of the file


def _jetstream(config: EmbeddedNats, directory: Path) -> list[str]:
    store = Path(config.store_dir).absolute() if config.store_dir else directory / "store"
    block = [f"store_dir: {_quoted(str(store))}", f"sync_interval: {_quoted(config.sync)}"]
    if config.max_store:
        block.append(f"max_file_store: {config.max_store}")
    return [f"jetstream {{ {', '.join(block)} }}"]


def _authorization(config: EmbeddedNats) -> list[str]:
    if config.user:
        return [
            f"authorization {{ user: {_quoted(config.user)}, password: {_quoted(config.password.reveal())} }}"
        ]
    if token := config.token.reveal():
        return [f"authorization {{ token: {_quoted(token)} }}"]
    return []


def _tls(config: EmbeddedNats, indent: str) -> list[str]:
    if not config.tls_cert:
        return []
    block = [f"cert_file: {_quoted(config.tls_cert)}", f"key_file: {_quoted(config.tls_key)}"]
    if config.tls_ca:
        block += [f"ca_file: {_quoted(config.tls_ca)}", "verify: true"]
    return [f"{indent}tls {{ {', '.join(block)} }}"]


def _cluster(config: EmbeddedNats, platform: str) -> list[str]:
    secret = config.route_secret.reveal()
    login = f"{ROUTE_USER}:{quote(secret, safe='')}@" if secret else ""
    lines = [
        "cluster {",
        f"  name: {_quoted(platform)}",
        f"  listen: {_quoted(f'{bracketed(config.host)}:{config.cluster_port}')}",
        # Declared routes are tried for ever; this is for those that the server hears of from others.
        "  connect_retries: 30",
        "  pool_size: 3",  # must be the same on all servers
        f"  routes: [{', '.join(_quoted(f'nats-route://{login}{route}') for route in config.routes)}]",
        *_tls(config, "  "),
    ]
    if secret:
        lines.append(f"  authorization {{ user: {ROUTE_USER}, password: {_quoted(secret)}, timeout: 5 }}")
    return [*lines, "}"]


def _quoted(text: str) -> str:
    """A string of nats-server's configuration. Control characters have no place in any of them."""
    if not text.isprintable():
        raise ConfigError(KEY, "(a value)", "contains control characters", "remove them")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
