"""From the declaration of an embedded server to nats-server's configuration, or a ConfigError.

Format: https://docs.nats.io/running-a-nats-service/configuration
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from urllib.parse import quote

from phalanx.bus.standin import EmbeddedNats, Secret
from phalanx.errors import ConfigError

ROUTE_USER = "route"
"""The user of the routes; its password is the declaration's ``route_secret``."""

LAME_DUCK_GRACE_SECONDS = 0.2
"""How long a server that steps aside keeps its clients before it closes them one by one."""

_DURATION = re.compile(r"[1-9][0-9]*(ms|s|m|h)")
_SIZE = re.compile(r"[1-9][0-9]*([KMGT](i?B)?)?")
_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+):([0-9]{1,5})")
_AUTHENTICATE = "set user and password, or token (or listen on 127.0.0.1)"


def check(config: EmbeddedNats) -> None:
    """Raise ConfigError for the first thing in *config* that is wrong, or would leave a server open."""
    _check_ports(config)
    _check_access(config)
    _check_routes(config)
    if config.sync != "always" and not _DURATION.fullmatch(config.sync):
        raise _error("sync", config.sync, "neither always nor a duration", "write always, 500ms, 10s or 2m")
    if config.max_store and not _SIZE.fullmatch(config.max_store):
        raise _error("max_store", config.max_store, "not a size", "write a number and a unit, such as 10GB")


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


def plain(secret: Secret) -> str:
    """The secret itself, for the configuration file and for logging in."""
    return secret.reveal()


def cluster_size(config: EmbeddedNats) -> int:
    """How many servers the cluster has, whether or not the routes name this one too; 1 without routes."""
    own = f"{bracketed(config.host)}:{config.cluster_port}"
    return len({*config.routes} - {own}) + 1


def bracketed(host: str) -> str:
    """*host* as it stands before a port: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether *host* can only be reached from this machine. Names other than localhost count as not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- checks


def _check_ports(config: EmbeddedNats) -> None:
    ports = {"port": config.port}
    if config.routes:
        ports["cluster_port"] = config.cluster_port
    if config.monitor_port:
        ports["monitor_port"] = config.monitor_port
    seen: dict[int, str] = {}
    for field, port in ports.items():
        if not 1 <= port <= 65535:
            raise _error(field, port, "not a port", "choose one from 1 to 65535")
        if port in seen:
            raise _error(field, port, f"{seen[port]} has the same", "choose different ports")
        seen[port] = field


def _check_access(config: EmbeddedNats) -> None:
    password, token = plain(config.password), plain(config.token)
    if bool(config.user) != bool(password):
        missing = "password" if config.user else "user"
        raise _error(missing, "", "user and password belong together", "set both or neither")
    if config.user and token:
        raise _error("user", config.user, "user and token exclude each other", "keep one of them")
    for field, secret in (("password", password), ("token", token)):
        if secret.startswith(("$2a$", "$2b$", "$2x$", "$2y$")):
            raise _error(field, "(secret)", "nats-server would take it for a bcrypt hash", "choose another")
    if bool(config.tls_cert) != bool(config.tls_key):
        missing = "tls_key" if config.tls_cert else "tls_cert"
        raise _error(missing, "", "tls_cert and tls_key belong together", "set both or neither")
    if is_loopback(config.host):
        return
    if not (config.user or token):
        raise _error("host", config.host, "listens beyond this machine without authentication", _AUTHENTICATE)
    if config.routes and not plain(config.route_secret):
        raise _error(
            "route_secret",
            "",
            f"routes on {config.host} would be open to anybody",
            "set the same on all nodes",
        )


def _check_routes(config: EmbeddedNats) -> None:
    for route in config.routes:
        match = _HOST_PORT.fullmatch(route)
        if match is None or not 1 <= int(match[2]) <= 65535:
            raise _error("routes", route, "not host:port", "name another node's host and its cluster_port")
        if is_loopback(config.host) and not is_loopback(match[1].strip("[]")):
            raise _error(
                "host",
                config.host,
                f"the server at {route} could not reach this one",
                "listen on an address that the other nodes reach",
            )


def _error(field: str, value: object, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"nats.embedded.{field}", value, problem, remedy)


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
            f"authorization {{ user: {_quoted(config.user)}, password: {_quoted(plain(config.password))} }}"
        ]
    if token := plain(config.token):
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
    secret = plain(config.route_secret)
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
        raise _error("", "(a value)", "contains control characters", "remove them")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
