"""What users declare as a health check: of an app, or of a backend that is to be ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from phalanx.config import rules, texts
from phalanx.config.aliases import CommandLine, Seconds, Texts, default
from phalanx.config.declaration import Declaration
from phalanx.config.rules import About


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
