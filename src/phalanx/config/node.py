"""What users declare of a node: its platform, NATS, timings, HTTP server, log.

The types are those of a *checked* declaration: durations are float seconds, a command is a tuple of
arguments. What may be written instead is in the aliases; type checkers see both. ``About`` is the only
source of the validation and of docs/configuration.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from phalanx.config import rules, texts
from phalanx.config.aliases import CommandLine, MaybeSeconds, PathText, Seconds, SecretText, Texts, default
from phalanx.config.declaration import Declaration
from phalanx.config.rules import About
from phalanx.config.secret import Secret


class Timings(Declaration, frozen=True, kw_only=True):
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
    ] = default(5.0)
    renew_every: Annotated[
        MaybeSeconds,
        About(
            "Between renewals of the session.",
            rules.Duration(0.02, 100, optional=True),
            default="ttl / 10",
            trade_off="Each is one small write to every session stream.",
        ),
    ] = default(None)
    fence_budget: Annotated[
        MaybeSeconds,
        About(
            "The end of a session that is kept free for killing what is still active.",
            rules.Duration(0.05, 60, optional=True),
            default="ttl / 5, at most 1 s",
        ),
    ] = default(None)
    grace: Annotated[
        MaybeSeconds,
        About(
            "Before that: how long active sections have to end by themselves.",
            rules.Duration(0, 200, optional=True),
            default="0.3 × ttl",
            trade_off="Long ones end more gracefully, but a node cut off from NATS gives up sooner.",
        ),
    ] = default(None)
    stall_limit: Annotated[
        MaybeSeconds,
        About(
            "A node whose event loop stands still for this long is killed by its keeper.",
            rules.Duration(0.2, 300, optional=True),
            default="2 s",
            trade_off="Short ones find a hanging node sooner, and punish code that blocks.",
        ),
    ] = default(None)


class _HidesSecrets(Declaration, frozen=True, kw_only=True):
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
            rules.Nested("list of URLs: `nats://` or `tls://`; or one text, separated by commas"),
        ),
    ] = default(("nats://127.0.0.1:4222",))
    user: Annotated[
        str, About("User to log in as; with `password`.", texts.Text("user name"), default="none")
    ] = ""
    password: Annotated[SecretText, About("Password of `user`.", texts.SecretRule())] = default(Secret())
    token: Annotated[SecretText, About("Token to log in with.", texts.SecretRule())] = default(Secret())
    nkey_seed: Annotated[SecretText, About("NKey seed to log in with (`SU…`).", texts.SecretRule())] = (
        default(Secret())
    )
    nkey_seed_file: Annotated[
        PathText, About("File with the NKey seed; read at each connection.", texts.File(), default="none")
    ] = default("")
    credentials: Annotated[
        PathText, About("Credentials file (JWT and seed, from `nsc`).", texts.File(), default="none")
    ] = default("")
    tls_ca: Annotated[
        PathText,
        About(
            "CA certificates (PEM) that the servers' are checked against.", texts.File(), default="system's"
        ),
    ] = default("")
    tls_cert: Annotated[
        PathText, About("Client certificate (PEM); with `tls_key`.", texts.File(), default="none")
    ] = default("")
    tls_key: Annotated[PathText, About("Key of `tls_cert` (PEM).", texts.File(), default="none")] = default(
        ""
    )
    tls_hostname: Annotated[
        str,
        About(
            "Name that the servers' certificates must have.",
            texts.Text("host name", spaces=False),
            default="the host of the URL",
        ),
    ] = ""
    server_name: Annotated[
        str,
        About(
            "Name of the NATS server on this same host. Leaders of an app's streams are then kept off it "
            "while the app is active here, so that a dead host does not cost an election of NATS too.",
            texts.Text("server name", spaces=False),
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
            texts.Host(),
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
            texts.Strings(texts.Address()),
            trade_off="Use three or five servers: two bear less than one.",
        ),
    ] = default(())
    store_dir: Annotated[
        PathText, About("Where JetStream stores.", texts.File(), default="`<data_dir>/nats/store`")
    ] = default("")
    sync: Annotated[
        str,
        About(
            "When stored messages are synced to disk.",
            texts.SyncInterval(),
            trade_off="`always`: before each acknowledgement. Others are faster, and the loss of power on "
            "all servers at once loses what was acknowledged since.",
        ),
    ] = "always"
    user: Annotated[str, About("User that clients log in as.", texts.Text("user name"), default="none")] = ""
    password: Annotated[SecretText, About("Password of `user`.", texts.SecretRule())] = default(Secret())
    token: Annotated[
        SecretText, About("Token that clients log in with, instead of `user`.", texts.SecretRule())
    ] = default(Secret())
    route_secret: Annotated[
        SecretText, About("What servers of the cluster show each other; the same on all.", texts.SecretRule())
    ] = default(Secret())
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
        About("The server's name.", texts.Text("server name", spaces=False), default="`<platform>-<node>`"),
    ] = ""
    max_store: Annotated[
        str, About("Most that JetStream may store.", texts.Size(), default="3/4 of the free disk")
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
        About("CA (PEM); clients and servers must then show certificates.", texts.File(), default="none"),
    ] = default("")
    tls_cert: Annotated[
        PathText, About("The server's certificate (PEM); with `tls_key`.", texts.File(), default="none")
    ] = default("")
    tls_key: Annotated[PathText, About("Key of `tls_cert` (PEM).", texts.File(), default="none")] = default(
        ""
    )


class HttpServer(Declaration, frozen=True, kw_only=True):
    """The node's own HTTP server: `/health`, `/ready`, `/status`, `/apps/…`, `/metrics`. Read-only."""

    host: Annotated[
        str,
        About(
            "Address to listen on.",
            texts.Host(),
            trade_off="Beyond loopback whoever reaches it can read the status; it has no passwords.",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, About("Port; 0: any free one, see the log.", rules.Whole(0, 65535))] = 7420
    enabled: Annotated[bool, About("Whether it runs at all.", rules.Switch())] = True


class Logging(Declaration, frozen=True, kw_only=True):
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


class _FenceCommand(Declaration, frozen=True):
    command: Annotated[
        CommandLine,
        About(
            "What makes sure that a host runs nothing any more: IPMI, a cloud's API. `{node}`, `{host}` and "
            "`{app}` in its arguments say who is to be fenced, for what. Exit code 0: it is so.",
            texts.Command(),
        ),
    ]


class Fence(_FenceCommand, frozen=True, kw_only=True):
    """A command that runs before an app is taken over from a node that did not end its session itself."""

    timeout: Annotated[
        Seconds,
        About(
            "A run that takes longer is killed and has failed.",
            rules.Duration(0.1, 600),
            trade_off="Adds to the failover of a dead host, as nothing starts before.",
        ),
    ] = default(10.0)
    retries: Annotated[int, About("Further runs after one that failed.", rules.Whole(0, 100))] = 2
    delay: Annotated[Seconds, About("Pause before each of them.", rules.Duration(0, 60))] = default(1.0)


class PlatformConfig(Declaration, frozen=True, kw_only=True):
    """One node of a platform."""

    name: Annotated[str, About("The platform's name; the same on all nodes.", texts.Label("a platform"))]
    node: Annotated[
        str,
        About(
            "This node's id, unique in the platform.",
            texts.Label("a node"),
            default="`$PHALANX_NODE`, else the host's name made a DNS label",
        ),
    ]
    data_dir: Annotated[
        PathText,
        About(
            "Where this node keeps its files; not shared with other nodes.",
            texts.File(),
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
        About("Free labels of this node, seen in its membership.", texts.Labels(), default="none"),
    ] = {}
    timings: Annotated[
        Timings, About("Durations of the session.", rules.Nested("see Timings"), default="see there")
    ] = Timings()
    fence: Annotated[
        Fence | None,
        About(
            "What fences another node before its apps are taken over.",
            rules.Nested("command, or see Fence"),
            default="none: nothing is taken over before the other's session is over",
        ),
    ] = None
    direct: Annotated[
        str,
        About(
            "`host:port` on which the other nodes reach this one without NATS (UDP); apps with "
            "`on_nats_loss = hold` need it on every node.",
            texts.DirectAddress(),
            default="none",
            trade_off="Datagrams are signed with a secret that is kept in the platform's bucket.",
        ),
    ] = ""
    http: Annotated[
        HttpServer, About("The node's HTTP server.", rules.Nested("see HTTP"), default="see there")
    ] = HttpServer()
    logging: Annotated[Logging, About("The log.", rules.Nested("see Logging"), default="see there")] = (
        Logging()
    )
