"""What must fit together inside one declaration whose single values are right."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence

from phalanx.config.apps import ActivePassive, AppConfig
from phalanx.config.backends import Docker, Process, Systemd
from phalanx.config.checks import Check
from phalanx.config.database_relations import database_relations
from phalanx.config.databases import SQLite
from phalanx.config.docker import Mount, PublishedPort
from phalanx.config.node import EmbeddedNats, HttpServer, NatsOptions, PlatformConfig, Timings
from phalanx.config.patterns import Pool
from phalanx.config.rules import seconds_text
from phalanx.config.texts import split_address
from phalanx.decide.backoff import Backoff
from phalanx.errors import ConfigError

HOLD_FACTOR = 0.95
"""As in decide.timing, which layer 0 cannot import; a test holds them equal."""

_NKEY_SEED = re.compile(r"SU[A-Z2-7]{56}")


def relations(config: object, key: str) -> Iterator[ConfigError]:
    """Everything that does not fit together in *config*, whatever declaration that is."""
    match config:
        case Timings():
            yield from _timings(config, key)
        case NatsOptions():
            yield from _nats(config, key)
        case EmbeddedNats():
            yield from _embedded(config, key)
        case Process():
            yield from _ready(config, key)
        case Systemd():
            yield from _ready(config, key)
        case Docker():
            yield from _docker(config, key)
            yield from _ready(config, key)
        case SQLite():
            yield from database_relations(config, key)
        case PlatformConfig():
            yield from _ports(config)
        case AppConfig():
            yield from _pattern(config, key)
        case Backoff() if config.longest < config.first:
            problem = f"shorter than first = {seconds_text(config.first)}"
            yield ConfigError(f"{key}.longest", config.longest, problem, "raise it")
        case _:
            pass


# --- apps


def _pattern(config: AppConfig, key: str) -> Iterator[ConfigError]:
    """What only an app with one active instance can have."""
    if isinstance(config.pattern, ActivePassive):
        return
    if isinstance(config.pattern, Pool):
        yield from _pool(config, key)
        return
    what = {
        "backend": config.backend,
        "database": config.database,
        "vip": config.vip,
        "events": config.events,
    }
    for name, value in what.items():
        if value:
            kind = config.pattern.__struct_config__.tag
            problem = f"a {kind} has no one active instance that could have it"
            remedy = f"leave {name} out and do it in the hooks, or declare ActivePassive()"
            yield ConfigError(f"{key}.{name}", f"({type(value).__name__})", problem, remedy)


def _pool(config: AppConfig, key: str) -> Iterator[ConfigError]:
    """What only one instance at a time can have."""
    if config.database is not None:
        problem = "a pool has several active instances, and a database has one writer"
        remedy = "put it into an ActivePassive() app and call that from the pool, or use the app's kv"
        yield ConfigError(f"{key}.database", "(SQLite)", problem, remedy)
    if config.vip:
        problem = "a pool has several active instances, and an address is on one host"
        remedy = "use a load balancer that asks /apps/NAME/active (docs/pool.md), or call it with to=Any"
        yield ConfigError(f"{key}.vip", [vip.address for vip in config.vip], problem, remedy)


# --- timings


def _timings(config: Timings, key: str) -> Iterator[ConfigError]:
    ttl = config.ttl
    renew = config.renew_every if config.renew_every is not None else ttl / 10
    fence = config.fence_budget if config.fence_budget is not None else min(1.0, ttl / 5)
    grace = config.grace if config.grace is not None else 0.3 * ttl
    if not 3 * renew < ttl:
        yield ConfigError(
            f"{key}.renew_every",
            renew,
            f"3 × renew_every = {seconds_text(3 * renew)} is not below ttl = {seconds_text(ttl)}",
            f"choose less than {seconds_text(ttl / 3)}, such as {seconds_text(ttl / 10)}, or raise ttl",
        )
        return
    needed, limit = fence + grace + 3 * renew, HOLD_FACTOR * ttl
    if not needed < limit:
        yield ConfigError(
            f"{key}.ttl",
            ttl,
            f"fence_budget {seconds_text(fence)} + grace {seconds_text(grace)} + 3 × renew_every "
            f"{seconds_text(renew)} = {seconds_text(needed)} is not below 0.95 × ttl = {seconds_text(limit)}",
            f"raise ttl above {seconds_text(needed / HOLD_FACTOR)} or lower one of the others",
        )


# --- NATS


def _nats(config: NatsOptions, key: str) -> Iterator[ConfigError]:
    yield from _pairs(config, key)
    ways = {
        "user": config.user or config.password,
        "token": config.token,
        "nkey_seed": config.nkey_seed,
        "nkey_seed_file": config.nkey_seed_file,
        "credentials": config.credentials,
    }
    used = [name for name, value in ways.items() if value]
    if len(used) > 1:
        shown = " and ".join(used)
        yield ConfigError(f"{key}.{used[-1]}", "(set)", f"{shown} exclude each other", "keep one of them")
    if config.nkey_seed and not _NKEY_SEED.fullmatch(config.nkey_seed.reveal()):
        yield ConfigError(
            f"{key}.nkey_seed", config.nkey_seed, "not a user's NKey seed", "it has 58 characters, SU first"
        )


def _embedded(config: EmbeddedNats, key: str) -> Iterator[ConfigError]:
    yield from _pairs(config, key)
    yield from _distinct_ports(config, key)
    if config.user and config.token:
        yield ConfigError(
            f"{key}.token", config.token, "user and token exclude each other", "keep one of them"
        )
    for field in ("password", "token", "route_secret"):
        secret = getattr(config, field)
        if secret.reveal().startswith(("$2a$", "$2b$", "$2x$", "$2y$")):
            yield ConfigError(
                f"{key}.{field}", secret, "nats-server takes it for a bcrypt hash", "choose another"
            )
    if not is_loopback(config.host):
        if not (config.user or config.token):
            yield ConfigError(
                f"{key}.host",
                config.host,
                "listens beyond this machine without authentication",
                "set user and password, or token (or listen on 127.0.0.1)",
            )
        if config.routes and not config.route_secret:
            yield ConfigError(
                f"{key}.route_secret",
                config.route_secret,
                f"routes on {config.host} would be open to anybody",
                "set the same on all nodes",
            )
    elif foreign := [r for r in config.routes if not is_loopback((split_address(r) or ("", 0))[0])]:
        yield ConfigError(
            f"{key}.host",
            config.host,
            f"the server at {foreign[0]} could not reach this one",
            "listen on an address that the other nodes reach",
        )
    most = len(config.routes) + 1  # whether the routes name this server too cannot be told for sure
    if config.replicas is not None and config.replicas > most:
        yield ConfigError(
            f"{key}.replicas",
            config.replicas,
            f"more copies than servers ({most} at most, by routes)",
            "name all servers in routes, or leave replicas out",
        )


def _pairs(config: NatsOptions | EmbeddedNats, key: str) -> Iterator[ConfigError]:
    for one, other in (("user", "password"), ("tls_cert", "tls_key")):
        if bool(getattr(config, one)) != bool(getattr(config, other)):
            missing = other if getattr(config, one) else one
            yield ConfigError(
                f"{key}.{missing}", "", f"{one} and {other} belong together", "set both or neither"
            )


def _distinct_ports(config: EmbeddedNats, key: str) -> Iterator[ConfigError]:
    seen: dict[int, str] = {}
    for field, port in _ports_of(config).items():
        if port in seen:
            yield ConfigError(f"{key}.{field}", port, f"{seen[port]} has the same", "choose different ports")
        seen.setdefault(port, field)


def _ports_of(config: EmbeddedNats) -> dict[str, int]:
    ports = {"port": config.port}
    if config.routes:
        ports["cluster_port"] = config.cluster_port
    if config.monitor_port:
        ports["monitor_port"] = config.monitor_port
    return ports


def _ports(config: PlatformConfig) -> Iterator[ConfigError]:
    """The node's HTTP server and its embedded NATS server share a machine."""
    if not isinstance(config.nats, EmbeddedNats) or not config.http.enabled:
        return
    if not _meet(config.http, config.nats.host):
        return
    for field, port in _ports_of(config.nats).items():
        if port == config.http.port:
            yield ConfigError(
                "http.port", port, f"the embedded NATS server's {field} is the same", "choose another"
            )


def _meet(http: HttpServer, host: str) -> bool:
    return http.host == host or not {http.host, host}.isdisjoint({"0.0.0.0", "::"})


def is_loopback(host: str) -> bool:
    """Whether *host* can only be reached from this machine. Names other than localhost count as not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- apps


def _docker(config: Docker, key: str) -> Iterator[ConfigError]:
    if bool(config.image) == bool(config.container):
        problem = "image and container exclude each other" if config.image else "neither image nor container"
        yield ConfigError(f"{key}.image", config.image, problem, "set one of them")
        return
    if not config.container:
        yield from _container(config, key)
        return
    for field in ("command", "env", "ports", "volumes", "network", "user", "memory", "init"):
        if given := getattr(config, field):
            shown = "(set)" if field == "env" else given
            problem = "an existing container has its own"
            yield ConfigError(f"{key}.{field}", shown, problem, "leave it out, or declare image")


def _container(config: Docker, key: str) -> Iterator[ConfigError]:
    published: set[tuple[int, str, str]] = set()
    for number, text in enumerate(config.ports):
        try:
            port = PublishedPort.parse(text)
        except ValueError as error:
            remedy = "write 8080, 80:8080 (host:container) or 10.0.0.9:80:8080, if need be with /udp"
            yield ConfigError(f"{key}.ports[{number}]", text, str(error), remedy)
            continue
        if (host := (port.host, port.protocol, port.address)) in published:
            yield ConfigError(f"{key}.ports[{number}]", text, "published twice", "leave one out")
        published.add(host)
    if config.ports and config.network in ("host", "none"):
        problem = f"nothing is published with network = {config.network!r}"
        yield ConfigError(f"{key}.ports", list(config.ports), problem, "leave it out")
    for number, text in enumerate(config.volumes):
        try:
            Mount.parse(text)
        except ValueError as error:
            remedy = "write source:target or source:target:ro; a source with a slash is a path of this host"
            yield ConfigError(f"{key}.volumes[{number}]", text, str(error), remedy)


def _ready(config: Process | Systemd | Docker, key: str) -> Iterator[ConfigError]:
    ready = config.ready
    if ready is None:
        return
    if ready.depends_on:
        yield ConfigError(
            f"{key}.ready.depends_on", list(ready.depends_on), "a ready check stands alone", "leave it out"
        )
    if ready.timeout > config.ready_timeout:
        yield ConfigError(
            f"{key}.ready.timeout",
            ready.timeout,
            f"longer than ready_timeout = {seconds_text(config.ready_timeout)}",
            "lower it, or raise ready_timeout",
        )


def check_relations(checks: Sequence[Check], key: str) -> Iterator[ConfigError]:
    """The named checks of one app: names unique, dependencies known, sensible and without a circle."""
    by_name: dict[str, Check] = {}
    for number, check in enumerate(checks):
        if check.name in by_name:
            yield ConfigError(f"{key}[{number}].name", check.name, "two checks have this name", "rename one")
        by_name.setdefault(check.name, check)
    for number, check in enumerate(checks):
        for name in check.depends_on:
            needed = by_name.get(name)
            if needed is None:
                remedy = f"choose from {', '.join(sorted(by_name))}"
                yield ConfigError(f"{key}[{number}].depends_on", name, "no check of this app", remedy)
            elif check.when == "always" and needed.when == "active":
                yield ConfigError(
                    f"{key}[{number}].depends_on",
                    name,
                    "runs only in the active section, so this check would never count on a standby",
                    "give both the same when",
                )
    if circle := _circle({name: check.depends_on for name, check in by_name.items()}):
        yield ConfigError(key, " → ".join(circle), "depends_on goes in a circle", "leave one of them out")


def _circle(edges: dict[str, Iterable[str]]) -> list[str]:
    """Some circle in the graph, its first member repeated at the end; empty if there is none."""
    done: set[str] = set()
    for start in edges:
        path: list[str] = []
        stack = [(start, False)]
        while stack:
            name, leaving = stack.pop()
            if leaving:
                path.pop()
                done.add(name)
            elif name in path:
                return [*path[path.index(name) :], name]
            elif name not in done:
                path.append(name)
                stack.append((name, True))
                stack.extend((other, False) for other in edges.get(name, ()))
    return []
