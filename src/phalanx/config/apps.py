"""What users declare of an app: its pattern, backend, database, health checks, hook timeouts.

The types are those of a *checked* declaration: durations are float seconds, a command is a tuple of
arguments. What may be written instead is in the aliases; type checkers see both. ``About`` is the only
source of the validation and of docs/configuration.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from phalanx.config import rules, texts
from phalanx.config.aliases import Seconds, default
from phalanx.config.backends import Backend
from phalanx.config.checks import Check
from phalanx.config.databases import SQLite
from phalanx.config.declaration import Declaration
from phalanx.config.events import Events
from phalanx.config.patterns import Pool, Ring
from phalanx.config.rules import About
from phalanx.config.vip import VirtualIP
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
    no_failover: Annotated[
        bool,
        About(
            "This node never takes the app over by itself; `switchover --to` it still can.",
            rules.Switch(),
        ),
    ] = False
    on_nats_loss: Annotated[
        Literal["demote", "hold"],
        About(
            "What the active node does when its session cannot be renewed. `demote`: stand down. `hold`: go "
            "on as long as every other member is reached directly and agrees that nobody else is active; "
            "needs `direct`. The same on all nodes.",
            rules.Choice(("demote", "hold")),
            trade_off="`hold` outlives the loss of NATS, but not of any member: it wants all of them.",
        ),
    ] = "demote"


class Restart(Declaration, frozen=True, kw_only=True):
    """A backend that ends or falls ill is started again in place so often, before another node takes over."""

    count: Annotated[
        int,
        About(
            "Restarts in place within `window`; one more failure, and another node takes over. 0: none.",
            rules.Whole(0, 1000),
            trade_off="A restart keeps the address and the database; a failover also survives a bad host.",
        ),
    ] = 2
    window: Annotated[Seconds, About("Restarts that are older do not count.", rules.Duration(1, 86400))] = (
        default(600.0)
    )
    delay: Annotated[
        Seconds,
        About("Before the first restart; twice as long before each further one.", rules.Duration(0, 60)),
    ] = default(0.1)
    longest_delay: Annotated[Seconds, About("The longest such delay.", rules.Duration(0, 3600))] = default(
        5.0
    )


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
    on_own: Annotated[
        Seconds, About("Deadline of `on_own`, for each partition of a ring.", rules.Duration(0.01, 3600))
    ] = default(30.0)
    on_release: Annotated[
        Seconds,
        About(
            "Deadline of `on_release`, for each partition.",
            rules.Duration(0.01, 3600),
            trade_off="The next owner of the partition may wait this long.",
        ),
    ] = default(10.0)
    on_prepare: Annotated[
        Seconds,
        About(
            "Deadline of `on_prepare`, for each partition.",
            rules.Duration(0.01, 3600),
            trade_off="The present owner keeps the partition meanwhile, unless it has to end.",
        ),
    ] = default(10.0)


class AppConfig(Declaration, frozen=True, kw_only=True):
    """One app."""

    name: Annotated[
        str, About("The app's name, unique in the platform.", texts.Label("an app", RESERVED_APPS))
    ]
    pattern: Annotated[
        ActivePassive | Pool | Ring,
        About("How its instances behave: `active-passive`, `pool` or `ring`.", rules.Nested("a pattern")),
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
    events: Annotated[
        Events | None,
        About(
            "Its own events.",
            rules.Nested("true, or see Events"),
            default="none, unless a handler is declared for them",
        ),
    ] = None
    vip: Annotated[
        tuple[VirtualIP, ...],
        About(
            "Virtual addresses that follow the active node.",
            rules.Nested("address/length, or see Virtual IP, or a list"),
            default="none",
        ),
    ] = ()
    restart: Annotated[
        Restart, About("Restarts of its backend in place.", rules.Nested("see Restart"), default="see there")
    ] = Restart()
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
