"""What users declare of an app: its pattern, backend, database, health checks, hook timeouts.

The types are those of a *checked* declaration: durations are float seconds, a command is a tuple of
arguments. What may be written instead is in the aliases; type checkers see both. ``About`` is the only
source of the validation and of docs/configuration.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from phalanx.config import rules, texts
from phalanx.config.aliases import CommandLine, PathText, Seconds, Texts, default
from phalanx.config.databases import SQLite
from phalanx.config.declaration import Declaration
from phalanx.config.rules import About
from phalanx.decide.backoff import Backoff
from phalanx.names import RESERVED_APPS


class ActivePassive(Declaration, frozen=True, kw_only=True, tag="active-passive", tag_field="type"):
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


class CheckSettings(Declaration, frozen=True, kw_only=True):
    """What all health checks have."""

    name: Annotated[
        str,
        About(
            "Name in status, logs and `depends_on`; unique in its app.",
            texts.Name(),
            default="kind of check, `-2`, `-3` … where it is taken",
        ),
    ] = ""
    interval: Annotated[
        Seconds,
        About(
            "From the start of one run to the start of the next. Runs of one check never overlap.",
            rules.Duration(0.05, 3600),
            trade_off="`interval × failures` is how long an illness may go unseen.",
        ),
    ] = default(2.0)
    timeout: Annotated[Seconds, About("A run that takes longer has failed.", rules.Duration(0.01, 600))] = (
        default(1.0)
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
            texts.Strings(texts.Name()),
        ),
    ] = default(())
    when: Annotated[
        Literal["active", "always"],
        About(
            "`active`: runs in the active section, and an unhealthy result ends it. `always`: runs on "
            "standbys too, and decides whether they are candidates.",
            rules.Choice(("active", "always")),
        ),
    ] = "active"


class _HttpTarget(CheckSettings, frozen=True):
    url: Annotated[str, About("What is fetched by GET.", texts.HttpUrl())]


class HttpCheck(_HttpTarget, frozen=True, kw_only=True, tag="http", tag_field="type"):
    """Healthy when a GET is answered with an expected status. Redirects are not followed."""

    expect: Annotated[
        tuple[int, int], About("Lowest and highest status that is healthy.", rules.Span(100, 599))
    ] = (200, 399)


class TcpCheck(CheckSettings, frozen=True, tag="tcp", tag_field="type"):
    """Healthy when a TCP connection can be made."""

    address: Annotated[str, About("Where to connect.", texts.Address())]


class CommandCheck(CheckSettings, frozen=True, tag="command", tag_field="type"):
    """Healthy when a program ends with exit code 0."""

    command: Annotated[CommandLine, About("The program and its arguments.", texts.Command())]


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
CHECKS = (HttpCheck, TcpCheck, CommandCheck, FunctionCheck)


# --- backends


class _Program(Declaration, frozen=True):
    command: Annotated[CommandLine, About("The program and its arguments.", texts.Command())]


class Process(_Program, frozen=True, kw_only=True, tag="process", tag_field="type"):
    """A program that runs, in a process group of its own, while the app is active on this node."""

    env: Annotated[
        Mapping[str, str],
        About("Environment variables on top of the node's own.", texts.Environment(), default="none"),
    ] = {}
    cwd: Annotated[PathText, About("Working directory.", texts.File(), default="the node's own")] = default(
        ""
    )
    user: Annotated[
        str,
        About(
            "User to run as; only root can.", texts.Text("user name", spaces=False), default="the node's own"
        ),
    ] = ""
    stop_signal: Annotated[str, About("Asks the program to end.", texts.Signal())] = "TERM"
    stop_timeout: Annotated[
        Seconds,
        About(
            "From the signal until SIGKILL of the whole process group.",
            rules.Duration(0, 3600),
            trade_off="A planned hand-over may take this long. A session that runs out does not wait for it.",
        ),
    ] = default(10.0)
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
    ] = default(30.0)


Backend = Process


# --- apps


class HookTimeouts(Declaration, frozen=True, kw_only=True):
    """How long each hook may run. One that overruns is cancelled, and counts as failed."""

    on_start: Annotated[Seconds, About("Deadline of `on_start`.", rules.Duration(0.01, 3600))] = default(30.0)
    on_active: Annotated[
        Seconds,
        About(
            "Deadline of `on_active`, up to its return or its first sign that it serves.",
            rules.Duration(0.01, 3600),
            trade_off="A hanging hook holds up the failover for this long before another node is tried.",
        ),
    ] = default(30.0)
    on_passive: Annotated[
        Seconds,
        About(
            "Deadline of `on_passive`.",
            rules.Duration(0.01, 3600),
            trade_off="A planned hand-over may wait this long.",
        ),
    ] = default(10.0)
    on_stop: Annotated[Seconds, About("Deadline of `on_stop`.", rules.Duration(0.01, 3600))] = default(10.0)
    on_leader_change: Annotated[
        Seconds, About("Deadline of `on_leader_change`.", rules.Duration(0.01, 3600))
    ] = default(5.0)
    on_health_change: Annotated[
        Seconds, About("Deadline of `on_health_change`.", rules.Duration(0.01, 3600))
    ] = default(5.0)


class AppConfig(Declaration, frozen=True, kw_only=True):
    """One app."""

    name: Annotated[
        str, About("The app's name, unique in the platform.", texts.Label("an app", RESERVED_APPS))
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
    database: Annotated[
        SQLite | None,
        About("Its database.", rules.Nested("path, or see Database: sqlite"), default="none"),
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


RETRY: dict[str, About] = {
    "first": About("Delay after the first failure.", rules.Duration(0.01, 3600)),
    "factor": About("How much longer each further delay is.", rules.Number(1, 10)),
    "longest": About(
        "The longest delay.",
        rules.Duration(0.01, 86400),
        trade_off="Short ones try a broken node again and again, long ones leave a repaired one idle.",
    ),
}
"""The fields of ``retry``, whose type belongs to layer 1."""
