"""What a scrape says, read by Prometheus' own parser."""

from __future__ import annotations

import math

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from phalanx.observe.metrics import CONTENT_TYPE, Metrics
from phalanx.types import AppStatus, DatabaseState, Health, NodeStatus, Position, Role

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def status(*apps: AppStatus, **changes: object) -> NodeStatus:
    """A node with these apps."""
    return NodeStatus("prod", "n1", "1.2.3", apps=apps, **changes)  # pyright: ignore[reportArgumentType]


def scrape(metrics: Metrics, of: NodeStatus) -> Series:
    """All series; the labels platform and node are checked here, once and for all."""
    series: Series = {}
    for family in text_string_to_metric_families(metrics.render(of).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("platform") == "prod"
            assert labels.pop("node") == "n1"
            key = (sample.name, tuple(sorted(labels.items())))
            assert key not in series
            series[key] = sample.value
    return series


@pytest.fixture
def metrics() -> Metrics:
    """The metrics of node n1."""
    return Metrics("prod", "n1", "1.2.3")


def test_gauges_say_what_the_status_says(metrics: Metrics) -> None:
    """Role, activity, epoch and health of each app, session, connection, readiness and build."""
    of = status(
        AppStatus("wiki", Role.ACTIVE, Health.HEALTHY, epoch=12),
        AppStatus("blog", Role.STANDBY, Health.UNHEALTHY, epoch=7),
        AppStatus("shop", Role.INELIGIBLE),
        session_left_seconds=4.5,
        connected=True,
        ready=True,
    )
    got = scrape(metrics, of)
    for name, role, active, epoch, healthy in (
        ("wiki", "active", 1, 12, 1),
        ("blog", "standby", 0, 7, 0),
        ("shop", "ineligible", 0, 0, 1),
    ):
        app = ("app", name)
        assert got["phalanx_app_active", (app,)] == active
        assert got["phalanx_app_epoch", (app,)] == epoch
        assert got["phalanx_app_healthy", (app,)] == healthy
        roles = {r: got["phalanx_app_role", (app, ("role", r.value))] for r in Role}
        assert {r.value for r, on in roles.items() if on} == {role}
        assert len(roles) == len(Role)
    assert got["phalanx_session_left_seconds", ()] == 4.5
    assert got["phalanx_nats_connected", ()] == 1
    assert got["phalanx_node_ready", ()] == 1
    assert got["phalanx_build_info", (("version", "1.2.3"),)] == 1


def test_databases_say_how_far_they_are(metrics: Metrics) -> None:
    """Only apps with a database have these series; a live one that does not get into the log is not ok."""
    following = DatabaseState("following", Position(40, 12), 0.5)
    stuck = DatabaseState("live", Position(7, 3), spool_bytes=99, problem="no NATS")
    of = status(
        AppStatus("wiki", Role.STANDBY, database=following),
        AppStatus("shop", Role.ACTIVE, database=stuck),
        AppStatus("blog", Role.ACTIVE),
    )
    got = scrape(metrics, of)
    wiki, shop, blog = ((("app", name),) for name in ("wiki", "shop", "blog"))
    assert (got["phalanx_database_ok", wiki], got["phalanx_database_ok", shop]) == (1, 0)
    assert got["phalanx_database_sequence", wiki] == 40
    assert got["phalanx_database_lag_seconds", wiki] == 0.5
    assert got["phalanx_database_spool_bytes", shop] == 99
    assert ("phalanx_database_ok", blog) not in got


def test_counters_start_at_zero_and_count(metrics: Metrics) -> None:
    """A declared app has its series before anything happened; each event counts once."""
    renewals = [41]
    metrics.read_renewals(lambda: renewals[0])
    metrics.declare_app("wiki")
    first = scrape(metrics, status())
    assert first["phalanx_failovers_total", (("app", "wiki"),)] == 0
    assert first["phalanx_nats_disconnections_total", ()] == 0
    metrics.leader_acquired("wiki")
    metrics.leader_acquired("blog")
    metrics.declare_app("wiki")
    metrics.nats_disconnected()
    metrics.nats_disconnected()
    renewals[0] += 1
    second = scrape(metrics, status())
    assert second["phalanx_failovers_total", (("app", "wiki"),)] == 1
    assert second["phalanx_failovers_total", (("app", "blog"),)] == 1
    assert second["phalanx_nats_disconnections_total", ()] == 2
    assert second["phalanx_session_renewals_total", ()] == 42


def test_durations_fall_into_cumulative_buckets(metrics: Metrics) -> None:
    """Each bucket holds what took as long as its bound or less; +Inf holds all."""
    for seconds in (0.0005, 0.001, 0.003, 90.0):
        metrics.observe_activation("wiki", seconds)
    metrics.observe_stand_down("wiki", 0.2)
    metrics.observe_hook("wiki", "on_active", 0.02)
    metrics.observe_step("wiki", "start-backend", 0.5)
    metrics.observe_step("wiki", "start-backend", 0.25)
    got = scrape(metrics, status())
    app = ("app", "wiki")
    buckets = {
        float(labels[1][1]): value
        for (name, labels), value in got.items()
        if name == "phalanx_activation_seconds_bucket"
    }
    assert (buckets[0.001], buckets[0.0025], buckets[0.005], buckets[60.0]) == (2, 2, 3, 3)
    assert buckets[math.inf] == got["phalanx_activation_seconds_count", (app,)] == 4
    assert got["phalanx_activation_seconds_sum", (app,)] == pytest.approx(90.0045)
    assert got["phalanx_stand_down_seconds_count", (app,)] == 1
    assert got["phalanx_hook_seconds_sum", (app, ("hook", "on_active"))] == 0.02
    step = (app, ("step", "start-backend"))
    assert got["phalanx_step_seconds_count", step] == 2
    assert got["phalanx_step_seconds_sum", step] == 0.75


def test_gauges_of_the_node_itself(metrics: Metrics) -> None:
    """Loop lag is what was set last; undelivered entries are asked for at the scrape."""
    metrics.read_undelivered(lambda: 17)
    metrics.read_ignored_datagrams(lambda: 3)
    metrics.set_loop_lag(0.25)
    metrics.set_loop_lag(0.125)
    got = scrape(metrics, status())
    assert got["phalanx_loop_lag_seconds", ()] == 0.125
    assert got["phalanx_audit_undelivered_entries", ()] == 17
    assert got["phalanx_direct_ignored_datagrams_total", ()] == 3


def test_nothing_is_shared_with_other_nodes_or_the_global_registry(metrics: Metrics) -> None:
    """Two nodes in one process, and a user's own metrics, do not see each other."""
    other = Metrics("prod", "n2", "1.2.3")
    other.leader_acquired("wiki")
    assert b"n2" not in metrics.render(status())
    assert not [family for family in REGISTRY.collect() if family.name.startswith("phalanx")]


def test_hostile_label_values_stay_inside_their_quotes(metrics: Metrics) -> None:
    """Quotes, backslashes and newlines in a value cannot forge a series."""
    hostile = 'a"} 1\nforged{x="\\'
    metrics.observe_step("wiki", hostile, 1.0)
    metrics.observe_hook("wiki", "\udcff", 1.0)
    got = scrape(metrics, status())
    assert got["phalanx_step_seconds_sum", (("app", "wiki"), ("step", hostile))] == 1
    assert "forged" not in {name for name, _ in got}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.1, 1e300, 5e-324, 2.0**53])
def test_any_number_is_written_as_prometheus_reads_it(metrics: Metrics, value: float) -> None:
    """Infinite, tiny and huge values come through exactly."""
    got = scrape(metrics, status(session_left_seconds=value))["phalanx_session_left_seconds", ()]
    assert got == value or (math.isnan(got) and math.isnan(value))


def test_every_series_follows_the_naming_rules(metrics: Metrics) -> None:
    """phalanx_<what>_<unit>, with a help text, in the format that the content type promises."""
    assert "version=0.0.4" in CONTENT_TYPE
    metrics.declare_app("wiki")
    for family in text_string_to_metric_families(
        metrics.render(status(AppStatus("wiki", Role.ACTIVE, database=DatabaseState("live")))).decode()
    ):
        assert family.name.startswith("phalanx_")
        assert family.documentation.endswith(".")
        assert family.type != "unknown"
