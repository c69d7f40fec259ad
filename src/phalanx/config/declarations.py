"""What users declare. Frozen; made by users as they like, checked once, by ``validate``.

The types here are what a *checked* declaration holds: durations are float seconds, a command is a tuple
of arguments. What may be written instead (``"5s"``, ``"python3 -m http.server"``) is in the aliases
below: type checkers see both. ``About`` is the single source of validation and of docs/configuration.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from phalanx.config import rules
from phalanx.config.rules import About
from phalanx.config.secret import Secret
from phalanx.decide.backoff import Backoff
from phalanx.names import RESERVED_APPS

if TYPE_CHECKING:
    # Type checkers take what __set__ accepts as the parameter of the constructor, and what __get__
    # returns as the type of the attribute (dataclass_transform with descriptors).
    class Seconds:
        def __get__(self, instance: object, owner: object = None) -> float: ...
        def __set__(self, instance: Any, value: float | str) -> None: ...

    class MaybeSeconds:
        def __get__(self, instance: object, owner: object = None) -> float | None: ...
        def __set__(self, instance: Any, value: float | str | None) -> None: ...

    class CommandLine:
        def __get__(self, instance: object, owner: object = None) -> tuple[str, ...]: ...
        def __set__(self, instance: Any, value: str | Sequence[str]) -> None: ...

    class Texts:
        def __get__(self, instance: object, owner: object = None) -> tuple[str, ...]: ...
        def __set__(self, instance: Any, value: Sequence[str]) -> None: ...

    class PathText:
        def __get__(self, instance: object, owner: object = None) -> str: ...
        def __set__(self, instance: Any, value: str | PathLike[str]) -> None: ...

    class SecretText:
        def __get__(self, instance: object, owner: object = None) -> Secret: ...
        def __set__(self, instance: Any, value: Secret | str) -> None: ...
else:
    Seconds = float
    MaybeSeconds = float | None
    CommandLine = tuple[str, ...]
    Texts = tuple[str, ...]
    PathText = str
    SecretText = Secret


def _default(value: object) -> Any:
    return value


# --- patterns


class ActivePassive(msgspec.Struct, frozen=True, kw_only=True, tag="active-passive", tag_field="pattern"):
    """One active instance, the others on standby."""

    priority: Annotated[
        int,
        About(
            "This node's preference for the app: among healthy standbys the highest takes over first.",
            rules.Whole(-1000, 1000),
            trade_off="A preference, no right: a better one does not take the app away from an active node.",
        ),
    ] = 0


# --- health checks


class CheckSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What all health checks have."""

    name: Annotated[
        str,
        About(
            "Name in status, logs and `depends_on`; unique in its app.",
            rules.Name(),
            default="kind of check, `-2`, `-3` … where it is taken",
        ),
    ] = ""
    interval: Annotated[
        Seconds,
        About(
            "From the start of one run to the start of the next.",
            rules.Duration(0.05, 3600),
            trade_off="`interval × failures` is how long an illness may go unseen.",
        ),
    ] = _default(2.0)
    timeout: Annotated[Seconds, About("A run that takes longer has failed.", rules.Duration(0.01, 600))] = (
        _default(1.0)
    )
    failures: Annotated[
        int,
        About(
            "Failed runs in a row until the check is unhealthy.",
            rules.Whole(1, 100),
            trade_off="Few find an illness sooner, many bear hiccups without a failover.",
        ),
    ] = 3
    successes: Annotated[
        int, About("Good runs in a row until an unhealthy check is healthy again.", rules.Whole(1, 100))
    ] = 1
    depends_on: Annotated[
        Texts,
        About(
            "Names of checks of this app that must be healthy for this one to count.",
            rules.Strings(rules.Name()),
        ),
    ] = _default(())
    when: Annotated[
        Literal["active", "always"],
        About(
            "`active`: runs in the active section, and an unhealthy result ends it. `always`: runs on "
            "standbys too, and decides whether they are candidates.",
            rules.Choice(("active", "always")),
        ),
    ] = "active"


class _HttpTarget(CheckSettings, frozen=True):
    url: Annotated[str, About("What is fetched by GET.", rules.HttpUrl())]


class HttpCheck(_HttpTarget, frozen=True, kw_only=True, tag="http", tag_field="type"):
    """Healthy when a GET is answered with an expected status. Redirects are not followed."""

    expect: Annotated[
        tuple[int, int], About("Lowest and highest status that is healthy.", rules.Span(100, 599))
    ] = (200, 399)


class TcpCheck(CheckSettings, frozen=True, tag="tcp", tag_field="type"):
    """Healthy when a TCP connection can be made."""

    address: Annotated[str, About("Where to connect.", rules.Address())]


class CommandCheck(CheckSettings, frozen=True, tag="command", tag_field="type"):
    """Healthy when a program ends with exit code 0."""

    command: Annotated[CommandLine, About("The program and its arguments.", rules.Command())]


class FunctionCheck(CheckSettings, frozen=True, tag="function", tag_field="type"):
    """Healthy unless a Python function returns False or raises. Only in Python."""

    function: Annotated[
        Callable[[], object],
        About(
            "Called without arguments; may be async, and must be if it takes time.",
            rules.Function(),
            python_only=True,
        ),
    ]


Check = HttpCheck | TcpCheck | CommandCheck | FunctionCheck


# --- backends


class _Program(msgspec.Struct, frozen=True):
    command: Annotated[CommandLine, About("The program and its arguments.", rules.Command())]


class Process(_Program, frozen=True, kw_only=True, tag="process", tag_field="type"):
    """A program that runs, in a process group of its own, while the app is active on this node."""

    env: Annotated[
        Mapping[str, str],
        About("Environment variables on top of the node's own.", rules.Environment(), default="none"),
    ] = {}
    cwd: Annotated[PathText, About("Working directory.", rules.File(), default="the node's own")] = _default(
        ""
    )
    user: Annotated[
        str,
        About(
            "User to run as; only root can.", rules.Text("user name", spaces=False), default="the node's own"
        ),
    ] = ""
    stop_signal: Annotated[str, About("Asks the program to end.", rules.Signal())] = "TERM"
    stop_timeout: Annotated[
        Seconds,
        About(
            "From the signal until SIGKILL of the whole process group.",
            rules.Duration(0, 3600),
            trade_off="A planned hand-over may take this long. A session that runs out does not wait for it.",
        ),
    ] = _default(10.0)
    ready: Annotated[
        Check | None,
        About(
            "The app is active only once this check is healthy.",
            rules.Nested("a check"),
            default="none: active as soon as the program runs",
        ),
    ] = None
    ready_timeout: Annotated[
        Seconds,
        About(
            "Not ready after this long: the activation has failed, and another node is tried.",
            rules.Duration(0.05, 3600),
        ),
    ] = _default(30.0)


Backend = Process


# --- apps


class HookTimeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long each hook may run. One that overruns is cancelled, and counts as failed."""

    on_start: Annotated[Seconds, About("Deadline of `on_start`.", rules.Duration(0.01, 3600))] = _default(
        30.0
    )
    on_active: Annotated[
        Seconds,
        About(
            "Deadline of `on_active`, up to its return or its first sign that it serves.",
            rules.Duration(0.01, 3600),
            trade_off="A hanging hook holds up the failover for this long before another node is tried.",
        ),
    ] = _default(30.0)
    on_passive: Annotated[
        Seconds,
        About(
            "Deadline of `on_passive`.",
            rules.Duration(0.01, 3600),
            trade_off="A planned hand-over may wait this long.",
        ),
    ] = _default(10.0)
    on_stop: Annotated[Seconds, About("Deadline of `on_stop`.", rules.Duration(0.01, 3600))] = _default(10.0)
    on_leader_change: Annotated[
        Seconds, About("Deadline of `on_leader_change`.", rules.Duration(0.01, 3600))
    ] = _default(5.0)
    on_health_change: Annotated[
        Seconds, About("Deadline of `on_health_change`.", rules.Duration(0.01, 3600))
    ] = _default(5.0)


class AppConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One app."""

    name: Annotated[
        str, About("The app's name, unique in the platform.", rules.Label("an app", RESERVED_APPS))
    ]
    pattern: Annotated[
        ActivePassive, About("How its instances behave: `active-passive`.", rules.Nested("a pattern"))
    ]
    backend: Annotated[
        Backend | None,
        About(
            "What runs while the app is active.", rules.Nested("a backend"), default="none: only the hooks"
        ),
    ] = None
    checks: Annotated[
        tuple[Check, ...],
        About(
            "Health checks.", rules.Nested("list of checks"), default="none: healthy while its backend runs"
        ),
    ] = ()
    hook_timeouts: Annotated[
        HookTimeouts, About("Deadlines of the hooks.", rules.Nested("see Hook timeouts"), default="see there")
    ] = HookTimeouts()
    kv_history: Annotated[
        int,
        About(
            "Revisions of each key that the app's KV keeps.",
            rules.Whole(1, 64),
            trade_off="More history, more storage. Changing it changes the bucket.",
        ),
    ] = 8
    retry: Annotated[
        Backoff,
        About(
            "Delay before this node tries again to become active after it failed.",
            rules.Nested("see Retry"),
            default="see there",
        ),
    ] = Backoff()


# --- the platform


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """What a failover costs, and what a session can bear. Must be the same on all nodes.

    They have to fit together: `3 × renew_every < ttl`, and
    `fence_budget + grace + 3 × renew_every < 0.95 × ttl`.
    """

    ttl: Annotated[
        Seconds,
        About(
            "A node that is not heard of for this long (× 1.05) is dead.",
            rules.Duration(1, 300),
            trade_off="It is what the death of a whole host costs. A crash of the process costs "
            "milliseconds, whatever the TTL. Short ones bear shorter pauses of machine and network.",
        ),
    ] = _default(5.0)
    renew_every: Annotated[
        MaybeSeconds,
        About(
            "Between renewals of the session.",
            rules.Duration(0.02, 100, optional=True),
            default="ttl / 10",
            trade_off="Each is one small write to every session stream.",
        ),
    ] = _default(None)
    fence_budget: Annotated[
        MaybeSeconds,
        About(
            "The end of a session that is kept free for killing what is still active.",
            rules.Duration(0.05, 60, optional=True),
            default="ttl / 5, at most 1 s",
        ),
    ] = _default(None)
    grace: Annotated[
        MaybeSeconds,
        About(
            "Before that: how long active sections have to end by themselves.",
            rules.Duration(0, 200, optional=True),
            default="0.3 × ttl",
            trade_off="Long ones end more gracefully, but a node cut off from NATS gives up sooner.",
        ),
    ] = _default(None)
    stall_limit: Annotated[
        MaybeSeconds,
        About(
            "A node whose event loop stands still for this long is killed by its keeper.",
            rules.Duration(0.2, 300, optional=True),
            default="2 s",
            trade_off="Short ones find a hanging node sooner, and punish code that blocks.",
        ),
    ] = _default(None)


class _HidesSecrets(msgspec.Struct, frozen=True, kw_only=True):
    """A secret that was given as plain text is hidden before anybody can print it."""

    def __post_init__(self) -> None:
        for field in ("password", "token", "nkey_seed", "route_secret"):
            value = getattr(self, field, None)
            if isinstance(value, str):
                msgspec.structs.force_setattr(self, field, Secret(value))


class NatsOptions(_HidesSecrets, frozen=True, kw_only=True):
    """NATS servers that somebody else runs. One way to log in, at most."""

    urls: Annotated[
        Texts,
        About(
            "The servers; name all that there are. User and password, or a token, in a URL are taken "
            "out of it.",
            rules.Nested(
                "list of URLs: `nats://`, `tls://`, `ws://`, `wss://`; or one text, separated by commas"
            ),
        ),
    ] = _default(("nats://127.0.0.1:4222",))
    user: Annotated[
        str, About("User to log in as; with `password`.", rules.Text("user name"), default="none")
    ] = ""
    password: Annotated[SecretText, About("Password of `user`.", rules.SecretRule())] = _default(Secret())
    token: Annotated[SecretText, About("Token to log in with.", rules.SecretRule())] = _default(Secret())
    nkey_seed: Annotated[SecretText, About("NKey seed to log in with (`SU…`).", rules.SecretRule())] = (
        _default(Secret())
    )
    nkey_seed_file: Annotated[
        PathText, About("File with the NKey seed; read at each connection.", rules.File(), default="none")
    ] = _default("")
    credentials: Annotated[
        PathText, About("Credentials file (JWT and seed, from `nsc`).", rules.File(), default="none")
    ] = _default("")
    tls_ca: Annotated[
        PathText,
        About(
            "CA certificates (PEM) that the servers' are checked against.", rules.File(), default="system's"
        ),
    ] = _default("")
    tls_cert: Annotated[
        PathText, About("Client certificate (PEM); with `tls_key`.", rules.File(), default="none")
    ] = _default("")
    tls_key: Annotated[PathText, About("Key of `tls_cert` (PEM).", rules.File(), default="none")] = _default(
        ""
    )
    tls_hostname: Annotated[
        str,
        About(
            "Name that the servers' certificates must have.",
            rules.Text("host name", spaces=False),
            default="the host of the URL",
        ),
    ] = ""
    server_name: Annotated[
        str,
        About(
            "Name of the NATS server on this same host. Leaders of an app's streams are then kept off it "
            "while the app is active here, so that a dead host does not cost an election of NATS too.",
            rules.Text("server name", spaces=False),
            default="none on this host",
        ),
    ] = ""
    replicas: Annotated[
        Literal[1, 3, 5] | None,
        About(
            "Copies of each stream, except session streams, which have one.",
            rules.Choice((1, 3, 5), optional=True),
            default="3 with three servers or more, else 1",
            trade_off="Three bear the loss of one server, five of two; each costs write latency.",
        ),
    ] = None


class EmbeddedNats(_HidesSecrets, frozen=True, kw_only=True):
    """A NATS server that each node runs beside itself; with `routes` they form a cluster."""

    host: Annotated[
        str,
        About(
            "Address to listen on. Other than loopback it needs `user` and `password` or `token`, and with "
            "`routes` a `route_secret`.",
            rules.Host(),
        ),
    ] = "127.0.0.1"
    port: Annotated[int, About("Port for clients.", rules.Whole(1, 65535))] = 4222
    cluster_port: Annotated[
        int, About("Port for the other servers; used with `routes`.", rules.Whole(1, 65535))
    ] = 6222
    routes: Annotated[
        Texts,
        About(
            "`host:cluster_port` of all servers of the cluster; may contain this one, so that it can be the "
            "same list everywhere.",
            rules.Strings(rules.Address()),
            trade_off="Use three or five servers: two bear less than one.",
        ),
    ] = _default(())
    store_dir: Annotated[
        PathText, About("Where JetStream stores.", rules.File(), default="`<data_dir>/nats/store`")
    ] = _default("")
    sync: Annotated[
        str,
        About(
            "When stored messages are synced to disk.",
            rules.SyncInterval(),
            trade_off="`always`: before each acknowledgement. Others are faster, and the loss of power on "
            "all servers at once loses what was acknowledged since.",
        ),
    ] = "always"
    user: Annotated[str, About("User that clients log in as.", rules.Text("user name"), default="none")] = ""
    password: Annotated[SecretText, About("Password of `user`.", rules.SecretRule())] = _default(Secret())
    token: Annotated[
        SecretText, About("Token that clients log in with, instead of `user`.", rules.SecretRule())
    ] = _default(Secret())
    route_secret: Annotated[
        SecretText, About("What servers of the cluster show each other; the same on all.", rules.SecretRule())
    ] = _default(Secret())
    monitor_port: Annotated[
        int,
        About(
            "Port of nats-server's HTTP monitoring, which asks for no password.",
            rules.Whole(0, 65535),
            default="0: off",
        ),
    ] = 0
    server_name: Annotated[
        str,
        About("The server's name.", rules.Text("server name", spaces=False), default="`<platform>-<node>`"),
    ] = ""
    max_store: Annotated[
        str, About("Most that JetStream may store.", rules.Size(), default="3/4 of the free disk")
    ] = ""
    replicas: Annotated[
        Literal[1, 3, 5] | None,
        About(
            "Copies of each stream, except session streams, which have one.",
            rules.Choice((1, 3, 5), optional=True),
            default="3 with three servers or more, else 1",
        ),
    ] = None
    tls_ca: Annotated[
        PathText,
        About("CA (PEM); clients and servers must then show certificates.", rules.File(), default="none"),
    ] = _default("")
    tls_cert: Annotated[
        PathText, About("The server's certificate (PEM); with `tls_key`.", rules.File(), default="none")
    ] = _default("")
    tls_key: Annotated[PathText, About("Key of `tls_cert` (PEM).", rules.File(), default="none")] = _default(
        ""
    )


class HttpServer(msgspec.Struct, frozen=True, kw_only=True):
    """The node's own HTTP server: `/health`, `/ready`, `/status`, `/apps/…`, `/metrics`. Read-only."""

    host: Annotated[
        str,
        About(
            "Address to listen on.",
            rules.Host(),
            trade_off="Beyond loopback whoever reaches it can read the status; it has no passwords.",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, About("Port; 0: any free one, see the log.", rules.Whole(0, 65535))] = 7420
    enabled: Annotated[bool, About("Whether it runs at all.", rules.Switch())] = True


class Logging(msgspec.Struct, frozen=True, kw_only=True):
    """The log, on standard error."""

    format: Annotated[
        Literal["console", "json"],
        About("For people, or one JSON object a line.", rules.Choice(("console", "json"))),
    ] = "console"
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        About(
            "The least important level that is shown.", rules.Choice(("debug", "info", "warning", "error"))
        ),
    ] = "info"


class PlatformConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One node of a platform."""

    name: Annotated[str, About("The platform's name; the same on all nodes.", rules.Label("a platform"))]
    node: Annotated[
        str,
        About(
            "This node's id, unique in the platform.",
            rules.Label("a node"),
            default="`$PHALANX_NODE`, else the host's name made a DNS label",
        ),
    ]
    data_dir: Annotated[
        PathText,
        About(
            "Where this node keeps its files; not shared with other nodes.",
            rules.File(),
            default="`$PHALANX_DATA`, else `/var/lib/phalanx/<platform>/<node>` for root, "
            "`$XDG_STATE_HOME/phalanx/…` or `~/.local/state/phalanx/…` for others",
        ),
    ]
    nats: Annotated[
        NatsOptions | EmbeddedNats,
        About("The NATS that all nodes share.", rules.Nested("see NATS"), default="`nats://127.0.0.1:4222`"),
    ] = NatsOptions()
    labels: Annotated[
        Mapping[str, str],
        About("Free labels of this node, seen in its membership.", rules.Labels(), default="none"),
    ] = {}
    timings: Annotated[
        Timings, About("Durations of the session.", rules.Nested("see Timings"), default="see there")
    ] = Timings()
    http: Annotated[
        HttpServer, About("The node's HTTP server.", rules.Nested("see HTTP"), default="see there")
    ] = HttpServer()
    logging: Annotated[Logging, About("The log.", rules.Nested("see Logging"), default="see there")] = (
        Logging()
    )
