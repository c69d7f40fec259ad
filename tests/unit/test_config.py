"""Declarations made in Python: what is right becomes its normal form, what is wrong gets one line."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest

from phalanx.config import (
    ActivePassive,
    CommandCheck,
    EmbeddedNats,
    FunctionCheck,
    HookTimeouts,
    HttpCheck,
    HttpServer,
    Logging,
    NatsOptions,
    Process,
    Ring,
    Secret,
    TcpCheck,
    Timings,
    build_app,
    build_platform,
    patterns,
)
from phalanx.config import relations as relations_module
from phalanx.decide import partition, ring, timing
from phalanx.decide.backoff import Backoff
from phalanx.errors import ConfigError

SEED = "SU" + "A" * 56


def platform(**options: Any) -> Any:
    """A node of "prod" in an empty environment."""
    return build_platform("prod", environ={}, **{"node": "n1", "data_dir": "/data", **options})


def app(**options: Any) -> Any:
    """The app "wiki"."""
    return build_app("wiki", options.pop("pattern", ActivePassive()), **options)


def error_of(build: Any) -> ConfigError:
    """The ConfigError that *build* raises; its text is one line of bearable length."""
    with pytest.raises(ConfigError) as caught:
        build()
    text = str(caught.value)
    assert text.isprintable(), text
    assert len(text) < 500
    assert text.startswith(f"{caught.value.key} = ")
    assert caught.value.remedy in text
    assert caught.value.problem in text
    return caught.value


# --- what is right


def test_defaults_of_a_node() -> None:
    """A name alone makes a node with a local NATS server, and its files below the state folder."""
    config = build_platform("prod", environ={"PHALANX_NODE": "n1"})
    assert config.nats == NatsOptions(urls=("nats://127.0.0.1:4222",))
    assert config.data_dir.endswith("/phalanx/prod/n1")
    assert (config.http, config.timings, config.logging) == (HttpServer(), Timings(), Logging())


def test_default_data_dir_of_ordinary_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other users than root get XDG_STATE_HOME, where it is absolute, else ~/.local/state."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for environ, expected in (
        ({"XDG_STATE_HOME": "/s"}, "/s/phalanx/prod/n1"),
        ({"XDG_STATE_HOME": "s", "HOME": "/home/u"}, "/home/u/.local/state/phalanx/prod/n1"),
    ):
        assert build_platform("prod", node="n1", environ=environ).data_dir == expected


def test_default_data_dir_of_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's nodes keep their files in /var/lib."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert build_platform("prod", node="n1", environ={}).data_dir == "/var/lib/phalanx/prod/n1"


@pytest.mark.parametrize(
    ("host", "node"),
    [("Web_1.example.com", "web-1"), ("n1", "n1"), ("-x-", "x"), ("a" * 80, "a" * 63)],
)
def test_node_id_from_host_name(monkeypatch: pytest.MonkeyPatch, host: str, node: str) -> None:
    """The host's name is made a DNS label."""
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert build_platform("prod", environ={}).node == node


def test_node_id_from_useless_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name without any usable character is an error that says what to set."""
    monkeypatch.setattr("socket.gethostname", lambda: "___")
    assert error_of(lambda: build_platform("prod", environ={})).key == "platform.node"


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(5, 5.0), (0.5, 0.5), ("500ms", 0.5), ("5s", 5.0), ("2m", 120.0), ("1h", 3600.0), ("0.01d", 864.0)],
)
def test_durations_in_all_notations(given: Any, seconds: float) -> None:
    """Numbers are seconds, text has a unit; a checked declaration holds float seconds."""
    value = app(backend=Process("x", stop_timeout=given)).backend.stop_timeout
    assert value == seconds
    assert type(value) is float


def test_command_as_text_and_as_list_are_equal() -> None:
    """Text is split by the rules of a shell, quotes included; a list is taken as it is."""
    text = app(backend=Process("sh -c 'echo \"$X\"'")).backend
    assert text == app(backend=Process(["sh", "-c", 'echo "$X"'])).backend
    assert text.command == ("sh", "-c", 'echo "$X"')


def test_a_checked_declaration_can_be_checked_again() -> None:
    """What build_* returns is a fixed point."""
    checks = [HttpCheck("http://h/"), TcpCheck("h:1", depends_on=["http"]), CommandCheck("true")]
    first = app(
        backend=Process("x y", ready=HttpCheck("http://127.0.0.1/"), env={"A": "b"}, cwd=Path("/tmp")),
        checks=checks,
        retry={"first": "1s"},
        hook_timeouts={"on_stop": 3},
    )
    again = app(
        backend=first.backend, checks=first.checks, retry=first.retry, hook_timeouts=first.hook_timeouts
    )
    assert again == first
    assert first.retry == Backoff(first=1.0)
    node = platform(nats="nats://u:p@h")
    assert platform(nats=node.nats, timings=node.timings, http=node.http, labels=node.labels) == node


def test_checks_without_names_get_their_kind() -> None:
    """Names are the kind, numbered where taken, so that depends_on and status can name each."""

    async def fine() -> bool:
        return True

    checks = [
        HttpCheck("http://a/"),
        HttpCheck("http://b/"),
        HttpCheck("http://c/", name="http-2"),
        FunctionCheck(fine),
    ]
    assert [check.name for check in app(checks=checks).checks] == ["http", "http-3", "http-2", "function"]


@pytest.mark.parametrize(
    ("nats", "expected"),
    [
        ("h", NatsOptions(urls=("nats://h:4222",))),
        ("nats://h:1, tls://[::1]", NatsOptions(urls=("nats://h:1", "tls://[::1]:4222"))),
        (["h:1", "h:1"], NatsOptions(urls=("nats://h:1",))),
        ("nats://u:p%40@h", NatsOptions(urls=("nats://h:4222",), user="u", password="p@")),
        ("nats://t@h,nats://k", NatsOptions(urls=("nats://h:4222", "nats://k:4222"), token="t")),
        (
            NatsOptions(urls="u:p@h", server_name="n"),
            NatsOptions(urls=("nats://h:4222",), user="u", password="p", server_name="n"),
        ),
        (
            NatsOptions(urls="u:p@h", password="p"),
            NatsOptions(urls=("nats://h:4222",), user="u", password="p"),
        ),
        ({"urls": "h", "nkey_seed": SEED}, NatsOptions(urls=("nats://h:4222",), nkey_seed=SEED)),
        ("embedded", EmbeddedNats()),
        ({"embedded": True, "port": 1}, EmbeddedNats(port=1)),
        ({"embedded": {"port": 1}}, EmbeddedNats(port=1)),
        ({"embedded": False, "urls": "h"}, NatsOptions(urls=("nats://h:4222",))),
        (EmbeddedNats(routes=["127.0.0.1:1"], replicas=1), EmbeddedNats(routes=("127.0.0.1:1",), replicas=1)),
    ],
)
def test_nats_in_all_forms(nats: Any, expected: Any) -> None:
    """URLs are taken apart, logins in them moved to their own fields."""
    assert platform(nats=nats).nats == expected


def test_ttl_of_one_second_and_of_five_minutes() -> None:
    """At both ends of the range the derived timings fit together."""
    for ttl in (1, "1s", 300, "5m"):
        assert platform(timings=Timings(ttl=ttl)).timings.ttl in (1.0, 300.0)


def test_relations_use_the_proportions_of_decide_timing() -> None:
    """Whatever validation accepts with defaults is what decide.timing makes of it."""
    assert relations_module.HOLD_FACTOR == timing.HOLD_FACTOR
    for ttl in (1.0, 1.5, 2.0, 5.0, 30.0, 300.0):
        rule = timing.Timing.of(ttl)
        assert rule.fence_budget + rule.grace + 3 * rule.renew_every < rule.hold
        platform(
            timings=Timings(
                ttl=ttl,
                renew_every=rule.renew_every,
                fence_budget=rule.fence_budget,
                grace=rule.grace,
                stall_limit=rule.stall_limit,
            )
        )


# --- the environment


@pytest.mark.parametrize(
    ("environ", "attribute", "expected"),
    [
        ({"PHALANX_NODE": "n9"}, "node", "n9"),
        ({"PHALANX_NODE": ""}, "node", "n1"),
        ({"PHALANX_DATA": "/elsewhere"}, "data_dir", "/elsewhere"),
        ({"PHALANX_HTTP": "off"}, "http", HttpServer(host="::1", enabled=False)),
        ({"PHALANX_HTTP": "0"}, "http", HttpServer(host="::1", port=0)),
        ({"PHALANX_HTTP": "[::1]:80"}, "http", HttpServer(host="::1", port=80)),
        ({"PHALANX_NATS": "k"}, "nats", NatsOptions(urls=("nats://k:4222",), token="t", tls_ca="/ca")),
        (
            {"PHALANX_NATS": "u:p@k"},
            "nats",
            NatsOptions(urls=("nats://k:4222",), user="u", password="p", tls_ca="/ca"),
        ),
        ({"PHALANX_NATS": "embedded"}, "nats", EmbeddedNats()),
    ],
)
def test_environment_overrides(environ: dict[str, str], attribute: str, expected: Any) -> None:
    """PHALANX_* win over what is declared; options that they don't speak of stay."""
    config = build_platform(
        "prod",
        environ=environ,
        node="n1",
        data_dir="/data",
        nats=NatsOptions(urls=("nats://h",), token=Secret("t"), tls_ca="/ca"),
        http=HttpServer(host="::1"),
    )
    assert getattr(config, attribute) == expected


@pytest.mark.parametrize(
    ("environ"),
    [
        {"PHALANX_NODE": "N 1"},
        {"PHALANX_DATA": "~/x"},
        {"PHALANX_NATS": "http://h"},
        {"PHALANX_HTTP": "on"},
        {"PHALANX_HTTP": "70000"},
    ],
)
def test_wrong_environment_is_named_by_its_variable(environ: dict[str, str]) -> None:
    """The key of the error is the variable, since that is what has to change."""
    assert error_of(lambda: build_platform("prod", environ=environ)).key == next(iter(environ))


# --- what is wrong

WRONG_PLATFORM: list[tuple[dict[str, Any], str, str]] = [
    ({"node": "N1"}, "platform.node", "a-z"),
    ({"node": ""}, "platform.node", "a-z"),
    ({"node": 7}, "platform.node", "a-z"),
    ({"noed": "n1"}, "platform.noed", "did you mean node?"),
    ({"timeings": 1}, "platform.timeings", "did you mean timings?"),
    ({"data_dir": ""}, "platform.data_dir", "write a path"),
    ({"data_dir": "~/x"}, "platform.data_dir", "whole path"),
    ({"data_dir": 5}, "platform.data_dir", "write a path"),
    ({"data_dir": "a\nb"}, "platform.data_dir", "remove"),
    ({"labels": ["a"]}, "labels", "a table"),
    ({"labels": {"zone": 5}}, "labels.zone", "quotes"),
    ({"labels": {5: "zone"}}, "labels", "as text"),
    ({"labels": {"a b": "c"}}, "labels.a b", "letters"),
    ({"labels": {"a": "c" * 300}}, "labels.a", "256"),
    ({"labels": {f"l{n}": "" for n in range(65)}}, "labels", "64"),
    ({"timings": 5}, "timings", "Timings(...)"),
    ({"timings": Timings(ttl=0.5)}, "timings.ttl", "1 s to 5 m"),
    ({"timings": Timings(ttl="301s")}, "timings.ttl", "1 s to 5 m"),
    ({"timings": Timings(ttl="5 parsecs")}, "timings.ttl", "500ms"),
    ({"timings": Timings(ttl="-5s")}, "timings.ttl", "500ms"),
    ({"timings": Timings(ttl=math.nan)}, "timings.ttl", "write seconds"),
    ({"timings": Timings(ttl=math.inf)}, "timings.ttl", "write seconds"),
    ({"timings": {"ttl": True}}, "timings.ttl", "write seconds"),
    ({"timings": {"ttl": None}}, "timings.ttl", "write seconds"),
    ({"timings": {"tll": 5}}, "timings.tll", "did you mean ttl?"),
    ({"timings": Timings(renew_every=0.01)}, "timings.renew_every", "20 ms"),
    ({"timings": Timings(ttl=3, renew_every=1)}, "timings.renew_every", "less than 1 s"),
    ({"timings": Timings(ttl=5, grace=4)}, "timings.ttl", "raise ttl above"),
    ({"timings": Timings(ttl=5, fence_budget="4s")}, "timings.ttl", "raise ttl above"),
    ({"timings": Timings(ttl=5, renew_every=1.6)}, "timings.ttl", "raise ttl above"),
    ({"timings": Timings(stall_limit=0.1)}, "timings.stall_limit", "200 ms"),
    ({"http": "127.0.0.1:80"}, "http", "HttpServer(...)"),
    ({"http": HttpServer(port=70000)}, "http.port", "0 to 65535"),
    ({"http": HttpServer(port=-1)}, "http.port", "0 to 65535"),
    ({"http": {"port": "80"}}, "http.port", "whole number"),
    ({"http": {"port": 80.5}}, "http.port", "whole number"),
    ({"http": {"port": True}}, "http.port", "whole number"),
    ({"http": HttpServer(host="")}, "http.host", "host name"),
    ({"http": HttpServer(host="[::1]")}, "http.host", "without brackets"),
    ({"http": HttpServer(host="1.2.3.400")}, "http.host", "IP address"),
    ({"http": {"enabled": "no"}}, "http.enabled", "true or false"),
    ({"logging": {"format": "xml"}}, "logging.format", "'console' or 'json'"),
    ({"logging": {"level": "INFO"}}, "logging.level", "'debug', 'info', 'warning' or 'error'"),
    ({"nats": ""}, "nats", "nats://host:4222"),
    ({"nats": " , "}, "nats", "nats://host:4222"),
    ({"nats": []}, "nats", "nats://host:4222"),
    ({"nats": 5}, "nats", "write URLs"),
    ({"nats": [5]}, "nats[0]", "nats://host:4222"),
    ({"nats": "http://h"}, "nats", "nats://host:4222"),
    ({"nats": "ws://h"}, "nats", "nats://host:4222"),
    ({"nats": "nats://h:0"}, "nats", "nats://host:4222"),
    ({"nats": "nats://h:99999"}, "nats", "nats://host:4222"),
    ({"nats": "nats://h/x"}, "nats", "nats://host:4222"),
    ({"nats": "nats://h?x=1"}, "nats", "nats://host:4222"),
    ({"nats": "nats://[::1"}, "nats", "nats://host:4222"),
    ({"nats": "nats://a b"}, "nats", "nats://host:4222"),
    ({"nats": "nats://u:p@h,nats://u:q@k"}, "nats", "one for all"),
    ({"nats": "nats://u:@h"}, "nats", "user:password@"),
    ({"nats": {"urls": 5}}, "nats.urls", "nats://host:4222"),
    ({"nats": {"url": "h"}}, "nats.url", "did you mean urls?"),
    ({"nats": {"embedded": "yes"}}, "nats.embedded", "true or false"),
    ({"nats": {"embedded": {}, "port": 1}}, "nats.port", "embedded"),
    ({"nats": NatsOptions(user="u")}, "nats.password", "both or neither"),
    ({"nats": NatsOptions(password="p")}, "nats.user", "both or neither"),
    ({"nats": NatsOptions(token="t", credentials="/c")}, "nats.credentials", "one of them"),
    ({"nats": NatsOptions(nkey_seed=SEED, nkey_seed_file="/s")}, "nats.nkey_seed_file", "one of them"),
    ({"nats": NatsOptions(nkey_seed="UA")}, "nats.nkey_seed", "58 characters"),
    ({"nats": NatsOptions(urls="u:p@h", user="v", password="p")}, "nats.user", "one of them"),
    ({"nats": NatsOptions(urls="u:p@h", token="t")}, "nats.token", "one of them"),
    ({"nats": NatsOptions(tls_cert="/c")}, "nats.tls_key", "both or neither"),
    ({"nats": NatsOptions(tls_key="/k")}, "nats.tls_cert", "both or neither"),
    ({"nats": {"replicas": 2}}, "nats.replicas", "1, 3 or 5"),
    ({"nats": {"password": 5}}, "nats.password", "write text"),
    ({"nats": NatsOptions(user="u", password="p\n")}, "nats.password", "remove"),
    ({"nats": NatsOptions(user="u", password="${PASSWORD}")}, "nats.password", "password_env"),
    ({"nats": NatsOptions(server_name="a b")}, "nats.server_name", "leave them out"),
    ({"nats": EmbeddedNats(port=0)}, "nats.port", "1 to 65535"),
    ({"nats": EmbeddedNats(port=5, monitor_port=5)}, "nats.monitor_port", "different ports"),
    ({"nats": EmbeddedNats(port=6222, routes=["127.0.0.1:1"])}, "nats.cluster_port", "different ports"),
    ({"nats": EmbeddedNats(host="10.0.0.1")}, "nats.host", "user and password"),
    (
        {"nats": EmbeddedNats(host="10.0.0.1", token="t", routes=["10.0.0.2:1"])},
        "nats.route_secret",
        "same on",
    ),
    ({"nats": EmbeddedNats(routes=["10.0.0.2:1"])}, "nats.host", "other nodes reach"),
    ({"nats": EmbeddedNats(routes=["10.0.0.2"])}, "nats.routes[0]", "host:port"),
    ({"nats": EmbeddedNats(routes="127.0.0.1:1")}, "nats.routes", "list"),
    ({"nats": EmbeddedNats(sync="often")}, "nats.sync", "always, 500ms"),
    ({"nats": EmbeddedNats(max_store="lots")}, "nats.max_store", "10GB"),
    ({"nats": EmbeddedNats(replicas=3)}, "nats.replicas", "routes"),
    ({"nats": EmbeddedNats(user="u", password="$2a$11$x")}, "nats.password", "another"),
    ({"nats": EmbeddedNats(user="u", password="p", token="t")}, "nats.token", "one of them"),
    ({"nats": EmbeddedNats(port=7420)}, "http.port", "another"),
]


@pytest.mark.parametrize(("options", "key", "hint"), WRONG_PLATFORM)
def test_wrong_value_of_a_node(options: dict[str, Any], key: str, hint: str) -> None:
    """Each wrong value is one line that names the key and says what would be right."""
    error = error_of(lambda: platform(**options))
    assert error.key == key
    assert hint in error.remedy


def checks(*items: Any) -> dict[str, Any]:
    """The option that declares these checks."""
    return {"checks": list(items)}


WEB = HttpCheck("http://127.0.0.1/")
WRONG_APP: list[tuple[dict[str, Any], str, str]] = [
    ({"pattern": "active"}, "apps.wiki.pattern.type", "active-passive"),
    ({"pattern": ActivePassive}, "apps.wiki.pattern", "ActivePassive()"),
    ({"pattern": None}, "apps.wiki.pattern", "ActivePassive(...)"),
    ({"pattern": ActivePassive(priority=1001)}, "apps.wiki.pattern.priority", "-1000 to 1000"),
    ({"pattern": ActivePassive(priority="high")}, "apps.wiki.pattern.priority", "whole number"),  # type: ignore
    ({"bakcend": 1}, "apps.wiki.bakcend", "did you mean backend?"),
    ({"kv_history": 0}, "apps.wiki.kv_history", "1 to 64"),
    ({"kv_history": 65}, "apps.wiki.kv_history", "1 to 64"),
    ({"backend": "python3"}, "apps.wiki.backend", "Process(...)"),
    ({"backend": {"command": "x"}}, "apps.wiki.backend.type", "process"),
    ({"backend": {"type": "podman"}}, "apps.wiki.backend.type", "process"),
    ({"backend": {"type": "process"}}, "apps.wiki.backend.command", "set it"),
    (
        {"backend": {"type": "process", "command": "x", "stop_timout": 1}},
        "apps.wiki.backend.stop_timout",
        "did you mean stop_timeout?",
    ),
    ({"backend": Process("")}, "apps.wiki.backend.command", "such as"),
    ({"backend": Process([])}, "apps.wiki.backend.command", "such as"),
    ({"backend": Process(["", "x"])}, "apps.wiki.backend.command", "such as"),
    ({"backend": Process("a 'b")}, "apps.wiki.backend.command", "quotes"),
    ({"backend": Process(["a", 5])}, "apps.wiki.backend.command[1]", "such as"),  # type: ignore
    ({"backend": Process(["a", "b\0"])}, "apps.wiki.backend.command", "remove"),
    ({"backend": Process(b"a")}, "apps.wiki.backend.command", "such as"),  # type: ignore
    ({"backend": Process("a", env={"A": 5})}, "apps.wiki.backend.env.A", "quotes"),  # type: ignore
    ({"backend": Process("a", env={"A=": "5"})}, "apps.wiki.backend.env.A=", "letters"),
    ({"backend": Process("a", env={"A": "\0"})}, "apps.wiki.backend.env.A", "remove"),
    ({"backend": Process("a", env="A=5")}, "apps.wiki.backend.env", "a table"),  # type: ignore
    ({"backend": Process("a", cwd=5)}, "apps.wiki.backend.cwd", "path"),  # type: ignore
    ({"backend": Process("a", user="a b")}, "apps.wiki.backend.user", "leave them out"),
    ({"backend": Process("a", stop_signal="WINCH")}, "apps.wiki.backend.stop_signal", "TERM"),
    ({"backend": Process("a", stop_signal=15)}, "apps.wiki.backend.stop_signal", "TERM"),  # type: ignore
    ({"backend": Process("a", stop_timeout=-1)}, "apps.wiki.backend.stop_timeout", "0 s to 1 h"),
    ({"backend": Process("a", stop_timeout="10")}, "apps.wiki.backend.stop_timeout", "5s"),
    ({"backend": Process("a", ready_timeout=0)}, "apps.wiki.backend.ready_timeout", "50 ms to 1 h"),
    ({"backend": Process("a", ready="http://h")}, "apps.wiki.backend.ready", "HttpCheck(...)"),  # type: ignore
    ({"backend": Process("a", ready=HttpCheck("h"))}, "apps.wiki.backend.ready.url", "http://"),
    (
        {"backend": Process("a", ready=TcpCheck("h:1", depends_on=["x"]))},
        "apps.wiki.backend.ready.depends_on",
        "leave it out",
    ),
    (
        {"backend": Process("a", ready=TcpCheck("h:1", timeout=60))},
        "apps.wiki.backend.ready.timeout",
        "lower",
    ),
    ({"checks": WEB}, "apps.wiki.checks", "list"),
    (checks("http://h"), "apps.wiki.checks[0]", "HttpCheck(...)"),
    (checks({"type": "htpp"}), "apps.wiki.checks[0].type", "http, tcp"),
    (checks({"type": ["http"]}), "apps.wiki.checks[0].type", "http, tcp"),
    (checks(WEB, {"type": "tcp"}), "apps.wiki.checks[1].address", "host:port"),
    (
        checks({"type": "tcp", "adress": "h:1", "address": "h:1"}),
        "apps.wiki.checks[0].adress",
        "did you mean address?",
    ),
    (checks(TcpCheck("h")), "apps.wiki.checks[0].address", "host:port"),
    (checks(TcpCheck("h:0")), "apps.wiki.checks[0].address", "host:port"),
    (checks(TcpCheck("::1:80")), "apps.wiki.checks[0].address", "host:port"),
    (checks(HttpCheck("ftp://h")), "apps.wiki.checks[0].url", "http://"),
    (checks(HttpCheck("http://h:x")), "apps.wiki.checks[0].url", "http://"),
    (checks(HttpCheck("http://h", expect=(200,))), "apps.wiki.checks[0].expect", "two"),  # type: ignore
    (checks(HttpCheck("http://h", expect=(300, 200))), "apps.wiki.checks[0].expect", "two"),
    (checks(HttpCheck("http://h", expect=(0, 200))), "apps.wiki.checks[0].expect", "two"),
    (checks(HttpCheck("http://h", expect=200)), "apps.wiki.checks[0].expect", "two"),  # type: ignore
    (checks(CommandCheck(" ")), "apps.wiki.checks[0].command", "such as"),
    (checks(FunctionCheck("f")), "apps.wiki.checks[0].function", "function"),  # type: ignore
    (checks(HttpCheck("http://h", interval=0)), "apps.wiki.checks[0].interval", "50 ms"),
    (checks(HttpCheck("http://h", timeout="1w")), "apps.wiki.checks[0].timeout", "5s"),
    (checks(HttpCheck("http://h", failures=0)), "apps.wiki.checks[0].failures", "1 to 100"),
    (checks(HttpCheck("http://h", successes=1.0)), "apps.wiki.checks[0].successes", "1 to 100"),  # type: ignore
    (checks(HttpCheck("http://h", name="a b")), "apps.wiki.checks[0].name", "letters"),
    (checks(HttpCheck("http://h", when="never")), "apps.wiki.checks[0].when", "'active'"),  # type: ignore
    (checks(HttpCheck("http://h", depends_on="x")), "apps.wiki.checks[0].depends_on", "list"),
    (checks(HttpCheck("http://h", depends_on=["x"])), "apps.wiki.checks[0].depends_on", "from http"),
    (checks(HttpCheck("http://h", depends_on=["http"])), "apps.wiki.checks", "leave one"),
    (
        checks(HttpCheck("http://h", depends_on=["tcp"]), TcpCheck("h:1", depends_on=["http"])),
        "apps.wiki.checks",
        "leave one",
    ),
    (
        checks(HttpCheck("http://h", name="x"), TcpCheck("h:1", name="x")),
        "apps.wiki.checks[1].name",
        "rename",
    ),
    (
        checks(HttpCheck("http://h", when="always", depends_on=["tcp"]), TcpCheck("h:1")),
        "apps.wiki.checks[0].depends_on",
        "same when",
    ),
    ({"hook_timeouts": 5}, "apps.wiki.hook_timeouts", "HookTimeouts(...)"),
    ({"hook_timeouts": HookTimeouts(on_active=0)}, "apps.wiki.hook_timeouts.on_active", "10 ms to 1 h"),
    ({"hook_timeouts": {"on_activ": 1}}, "apps.wiki.hook_timeouts.on_activ", "did you mean on_active?"),
    ({"retry": 5}, "apps.wiki.retry", "Backoff(...)"),
    ({"retry": Backoff(first=0)}, "apps.wiki.retry.first", "10 ms"),
    ({"retry": Backoff(factor=0.5)}, "apps.wiki.retry.factor", "1 to 10"),
    ({"retry": Backoff(first=9, longest=8)}, "apps.wiki.retry.longest", "raise"),
]


@pytest.mark.parametrize(("options", "key", "hint"), WRONG_APP)
def test_wrong_value_of_an_app(options: dict[str, Any], key: str, hint: str) -> None:
    """Each wrong value is one line that names the key and says what would be right."""
    error = error_of(lambda: app(**options))
    assert error.key == key
    assert hint in error.remedy


@pytest.mark.parametrize(
    "name",
    ["", "Wiki", "a_b", "-a", "a" * 64, "platform", "services", "wiki\n", 5, None, [], "a.b"],
)
def test_wrong_names_of_apps(name: Any) -> None:
    """An app's name is a DNS label that Phalanx does not need itself."""
    assert error_of(lambda: build_app(name, ActivePassive())).key == "apps"


@pytest.mark.parametrize("name", ["", "Prod", "a_b", "a" * 64, "prod ", 5, None, b"prod"])
def test_wrong_names_of_platforms(name: Any) -> None:
    """A platform's name is a DNS label."""
    assert error_of(lambda: build_platform(name, environ={})).key == "platform.name"


def test_errors_bear_any_object() -> None:
    """A value whose repr() fails, or is long, or has many lines, still gives one short line."""

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    class Verbose:
        def __repr__(self) -> str:
            return "line\n" * 1000

    for value in (Broken(), Verbose(), 10**5000, "x" * 10000, datetime.date(2020, 1, 1)):
        error_of(lambda value=value: platform(http=value))
        error_of(lambda value=value: platform(http={"port": value}))
        error_of(lambda value=value: app(backend=value))


@pytest.mark.parametrize(
    ("make", "key", "hint"),
    [
        (lambda: Process("x", stop_timout=5), "Process.stop_timout", "did you mean stop_timeout?"),
        (lambda: NatsOptions(pasword="hunter2"), "NatsOptions.pasword", "did you mean password?"),
        (lambda: HttpServer(bind=1), "HttpServer.bind", "known are: host, port, enabled"),
        (lambda: Process(), "Process", "command"),
        (lambda: Process("a", "b"), "Process", "command"),
    ],
)
def test_wrongly_called_declaration(make: Any, key: str, hint: str) -> None:
    """A misspelt or missing argument is a ConfigError too, before anything is checked or started."""
    error = error_of(make)
    assert (error.key, hint in error.remedy) == (key, True)
    assert "hunter2" not in str(error)


@pytest.mark.parametrize(
    ("options", "key", "text"),
    [
        ({"pattern": Ring(partitions=0)}, "apps.wiki.pattern.partitions", "1 to 16384"),
        ({"pattern": Ring(partitions=16385)}, "apps.wiki.pattern.partitions", "1 to 16384"),
        ({"pattern": Ring(weight=-1)}, "apps.wiki.pattern.weight", "0 to 1000"),
        ({"pattern": Ring(parallel=0)}, "apps.wiki.pattern.parallel", "1 to 4096"),
        ({"pattern": Ring, "backend": None}, "apps.wiki.pattern", "write Ring()"),
        ({"pattern": Ring(), "backend": Process("true")}, "apps.wiki.backend", "leave backend out"),
        ({"pattern": Ring(), "database": "w.db"}, "apps.wiki.database", "leave database out"),
        ({"pattern": Ring(), "vip": "10.0.0.9/24"}, "apps.wiki.vip", "leave vip out"),
    ],
)
def test_ring_that_cannot_be_is_refused_with_what_would_be_right(
    options: dict[str, Any], key: str, text: str
) -> None:
    """Numbers out of range, and what only an app with one active instance can have."""
    found = error_of(lambda: build_app("wiki", **options))
    assert found.key == key
    assert text in str(found)


def test_limits_of_a_ring_are_those_of_the_decisions() -> None:
    """Layer 0 cannot import them."""
    assert patterns.MAX_PARTITIONS == partition.MAX_PARTITIONS
    assert patterns.MAX_WEIGHT == ring.MAX_WEIGHT
