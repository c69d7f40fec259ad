"""The parts of the command line that need neither NATS nor processes."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from pathlib import Path

import pytest

from phalanx.cli import exits, main, output, views
from phalanx.cli.audit import moment
from phalanx.cli.findings import Finding, Level, ok, run_checks
from phalanx.cli.nats_checks import judge_clocks, judge_writes
from phalanx.cli.switchover import moment_ahead
from phalanx.client import NodeView
from phalanx.errors import (
    BusError,
    BusUnavailable,
    ConfigError,
    NatsUnusable,
    PlatformNotFound,
    StartError,
    StepDownFailed,
)
from phalanx.types import AppStatus, Health, Member, NodeStatus, Role, SessionId

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("text", "ago"), [("90s", 90), ("10m", 600), ("2h", 7200), ("7d", 604800), ("1.5m", 90)]
)
def test_since_as_duration(text: str, ago: float) -> None:
    """A number with a unit means that long ago."""
    assert moment(text, NOW) == NOW - ago


def test_since_as_time() -> None:
    """ISO times: with an offset as they say, without one in local time."""
    assert moment("2025-05-01T12:00:00+02:00", NOW) == datetime.fromisoformat("2025-05-01T10:00Z").timestamp()
    assert moment("2025-05-01T12:00", NOW) == datetime(2025, 5, 1, 12).timestamp()


@pytest.mark.parametrize("text", ["", "10", "10x", "-5m", "soon", "1e9s", "99999-01-01"])
def test_since_as_nonsense(text: str) -> None:
    """Anything else is bad input."""
    with pytest.raises(ConfigError, match="--since"):
        moment(text, NOW)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a", 1, "b", "c"), 2),
        (StartError("a", "b"), 2),
        (NatsUnusable("a", "b"), 3),
        (PlatformNotFound("a", "b"), 3),
        (BusUnavailable("a", "b"), 3),
        (BusError("a", "b"), 1),
        (StepDownFailed("a", "b", "c"), 1),
    ],
)
def test_exit_codes(error: Exception, code: int) -> None:
    """Each error has its documented exit code."""
    assert exits.code_of(error) == code  # type: ignore[arg-type]


def test_no_control_characters_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """What others have named cannot move the cursor, nor make markup."""
    output.say("a\x1b[2Jb\nc", ("[red]d[/red]", "bold"))
    output.table(("A",), [("x\x1b]0;title\x07y",)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[red]d[/red]" in out
    assert len(out.splitlines()) == 3


def test_long_rows_are_not_wrapped_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """One row is one line for grep and awk."""
    output.table(("A", "B"), [("x" * 150, "y" * 150)])
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0.4 ms"), (0.25, "250 ms"), (3.21, "3.2 s"), (300, "5 min"), (7200, "2 h"), (864000, "10 d")],
)
def test_spans(seconds: float, text: str) -> None:
    """Durations are short for people."""
    assert output.span(seconds) == text


# --- health


def node(name: str, *apps: AppStatus, problems: tuple[str, ...] = (), connected: bool = True) -> NodeView:
    """A node that answers."""
    session = SessionId(name, "0")
    member = Member(name, session, 1.0, "1", apps=tuple(app.name for app in apps))
    status = NodeStatus("prod", name, "1", str(session), 1.0, True, connected, apps=apps, problems=problems)
    return NodeView(node=name, is_live=True, member=member, status=status)


def silent(name: str, *apps: str, live: bool = True) -> NodeView:
    """A node that does not answer."""
    return NodeView(node=name, is_live=live, member=Member(name, SessionId(name, "0"), 1.0, "1", apps=apps))


def app(role: Role, epoch: int = 7, health: Health = Health.HEALTHY) -> AppStatus:
    """The app wiki on one node."""
    return AppStatus("wiki", role, health, epoch)


@pytest.mark.parametrize(
    ("nodes", "reasons"),
    [
        ([], ["the platform has no nodes"]),
        ([node("n1", app(Role.ACTIVE)), node("n2", app(Role.STANDBY))], []),
        ([node("n1", app(Role.ACTIVE, health=Health.UNKNOWN))], []),
        ([node("n1", app(Role.STANDBY))], ["app wiki: no node is active"]),
        ([node("n1", app(Role.ACTIVE, health=Health.UNHEALTHY))], ["app wiki: unhealthy on n1"]),
        (
            [node("n1", app(Role.ACTIVE, 7)), node("n2", app(Role.ACTIVE, 9))],
            ["app wiki: several nodes say they are active: n1 (epoch 7), n2 (epoch 9)"],
        ),
        ([node("n1", app(Role.ACTIVE)), silent("n2", "wiki")], ["node n2: the node does not answer"]),
        (
            [silent("n1", "wiki", live=False)],
            ["node n1: the node does not answer, its session is over", "app wiki: no node is active"],
        ),
        ([node("n1", app(Role.ACTIVE), problems=("disk full",))], ["node n1: disk full"]),
        ([node("n1", app(Role.ACTIVE), connected=False)], ["node n1: not connected to NATS"]),
    ],
)
def test_health_verdict(nodes: list[NodeView], reasons: list[str]) -> None:
    """What makes a platform unhealthy, and what does not."""
    assert views.verdict(views.platform_view("prod", nodes)) == reasons


def test_of_two_active_nodes_the_higher_epoch_is_shown() -> None:
    """One that has not heard yet that its reign is over does not hide the new leader."""
    view = views.platform_view("prod", [node("n1", app(Role.ACTIVE, 9)), node("n2", app(Role.ACTIVE, 7))])
    assert (view.apps[0].active, view.apps[0].epoch) == ("n1", 9)


# --- doctor


def test_slow_writes_against_the_ttl() -> None:
    """A median above a twentieth of the TTL fails, a single slow one warns."""
    assert judge_writes([0.001] * 20, 1.0).level is Level.OK
    assert judge_writes([0.001] * 19 + [0.08], 1.0).level is Level.WARN
    slow = judge_writes([0.08] * 20, 1.0)
    assert slow.level is Level.FAIL
    assert "raise timings.ttl above 1.6 s" in slow.remedy


def test_clocks_that_differ() -> None:
    """Another time is a warning, another rate a failure, the network's jitter nothing."""
    steady = [(100.0, 1100.0), (101.0, 1101.01)]
    assert [each.level for each in judge_clocks(steady, 1000.0)] == [Level.OK]
    assert [each.level for each in judge_clocks(steady, 990.0)] == [Level.WARN]
    assert [each.level for each in judge_clocks([(100.0, 1100.0), (101.0, 1101.2)], 1000.0)] == [Level.FAIL]
    assert [each.level for each in judge_clocks([(100.0, 1100.0), (100.2, 1100.22)], 1000.0)] == [Level.OK]
    assert judge_clocks([], 0.0) == []


async def test_a_check_that_raises_has_failed_and_the_others_run() -> None:
    """One broken check does not hide what the others find."""

    async def broken() -> list[Finding]:
        raise BusError("ask", "it said no")

    async def fine() -> list[Finding]:
        return [ok("b", "well")]

    found = [finding async for finding in run_checks([("a", broken), ("b", fine)])]
    assert [(each.check, each.level) for each in found] == [("a", Level.FAIL), ("b", Level.OK)]
    assert "it said no" in found[0].text


# --- what needs no platform


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Three versions, as text and as JSON."""
    assert main.run(["version"]) == 0
    assert re.fullmatch(
        r"phalanx \S+, nats-server \d+\.\d+\.\d+, Python 3\.\d+\.\d+\n", capsys.readouterr().out
    )
    assert main.run(["version", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"phalanx", "nats_server", "python"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_all_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The script for each shell has every command, and options of theirs."""
    assert main.run(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*main.COMMANDS, "permissions", "check", "follow", "reason"):
        assert word in script, word


def test_help_of_every_command_says_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """--help of the program and of each command, also of their subcommands."""
    paths = [[], *([name] for name in main.COMMANDS), ["config", "check"], ["nats", "permissions"]]
    for path in paths:
        assert main.run([*path, "--help"]) == 0
        out = capsys.readouterr().out
        assert f"Usage: {' '.join(['phalanx', *path])}" in out
        assert "Exit codes: 0 fine; 1 the answer is no" in out


def test_permissions_of_a_file_and_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same text from a declaration as from names; a wrong name is bad input."""
    monkeypatch.chdir(tmp_path)
    Path("phalanx.toml").write_text(
        '[platform]\nname = "prod"\n[apps.wiki]\npattern = "active-passive"\n'
        '[apps.shop]\npattern = "active-passive"\n'
    )
    assert main.run(["nats", "permissions"]) == 0
    by_file = capsys.readouterr().out
    assert main.run(["nats", "permissions", "--platform", "prod", "--app", "wiki", "--app", "shop"]) == 0
    assert capsys.readouterr().out == by_file
    assert '"prod-app-shop"' in by_file
    assert main.run(["nats", "permissions", "--platform", "prod", "--app", "No"]) == 2


def test_documentation_has_every_command_and_exit_code() -> None:
    """docs/cli.md names each command with its options, and each exit code."""
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for name in main.COMMANDS:
        assert f"phalanx {name}" in text, name
    for code in (
        exits.OK,
        exits.NO,
        exits.BAD_INPUT,
        exits.UNREACHABLE,
        exits.INTERRUPTED,
        exits.BROKEN_PIPE,
    ):
        assert f"| {code} |" in text, code
    for kind in (views.PlatformView, views.NodeRow, views.AppView, views.AppOnNode, Finding):
        for field in kind.__struct_fields__:
            assert f"`{field}`" in text, (kind, field)


@pytest.mark.parametrize(
    ("text", "at"), [("13:37", 1_774_784_220), ("2026-03-29T13:37+01:00", 1_774_787_820)]
)
def test_time_of_a_switchover_on_the_day_the_clocks_change(
    text: str, at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time of today is by the clock on the wall then, not by the offset that holds when it is planned."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        before_the_change = datetime(2026, 3, 29, 0, 30).timestamp()
        assert moment_ahead(text, before_the_change) == at
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "day", "problem", "choice"),
    [
        ("02:30", 29, "is skipped", "2026-03-29T01:30:00+01:00 or 2026-03-29T03:30:00+02:00"),
        ("2026-10-25T02:30", 29, "comes twice", "2026-10-25T02:30:00+02:00 or 2026-10-25T02:30:00+01:00"),
    ],
)
def test_time_that_the_clocks_skip_or_repeat_is_refused_with_the_choice(
    text: str, day: int, problem: str, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of the two moments is meant is the operator's to say; written with its offset each is taken."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        now = datetime(2026, 3, day, 0, 30).timestamp()
        with pytest.raises(ConfigError, match=problem) as caught:
            moment_ahead(text, now)
        assert caught.value.remedy == f"write {choice}"
        one, other = (moment_ahead(each, now) for each in choice.split(" or "))
        assert other - one == 3600
    finally:
        monkeypatch.undo()
        time.tzset()
