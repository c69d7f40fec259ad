"""Metrics of one node, in Prometheus' text format.

What the node's status says already is read from it at the moment of a scrape, so the two can't disagree.
Only what happens between scrapes is counted here, in plain numbers: no locks, no global registry, and no
cost for what is never scraped. Every series has the labels ``platform`` and ``node``; series about an app
have ``app`` too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from phalanx.types import AppStatus, Health, NodeStatus, Role

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""The content type of what :meth:`Metrics.render` returns: the text format that every scraper reads."""

BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histograms: a hand-over takes milliseconds, a slow backend a minute."""

_BOUNDS = (*(str(bound) for bound in BUCKETS_SECONDS), "+Inf")
_Labels = tuple[str, ...]


class _Histogram:
    """Durations of one kind, by labels."""

    def __init__(self, name: str, about: str, labels: Sequence[str]) -> None:
        self._name, self._about, self._labels = name, about, labels
        self._counts: dict[_Labels, list[int]] = {}
        self._sums: dict[_Labels, float] = {}

    def observe(self, labels: _Labels, seconds: float) -> None:
        counts = self._counts.setdefault(labels, [0] * len(_BOUNDS))
        counts[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self._sums[labels] = self._sums.get(labels, 0.0) + seconds

    def metric(self, common: _Labels) -> Metric:
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        for labels, counts in self._counts.items():
            total, buckets = 0, list[tuple[str, float]]()
            for bound, count in zip(_BOUNDS, counts, strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric((*common, *labels), buckets, self._sums[labels])
        return family


_NODE = ("platform", "node")
_APP = (*_NODE, "app")


class Metrics:
    """The metrics of one node. Only for the thread of the event loop."""

    def __init__(self, platform: str, node: str, version: str) -> None:
        self._common = (platform, node)
        self._version = version
        self._failovers: dict[str, int] = {}
        self._renewals: Callable[[], int] = int
        self._undelivered: Callable[[], int] = int
        self._disconnections = 0
        self._loop_lag = 0.0
        self._steps: dict[_Labels, tuple[int, float]] = {}
        self._activation = _Histogram(
            "phalanx_activation_seconds", "From the acquired epoch to an active app.", _APP
        )
        self._stand_down = _Histogram("phalanx_stand_down_seconds", "The end of an active section.", _APP)
        self._hooks = _Histogram("phalanx_hook_seconds", "Runs of hooks, failed ones too.", (*_APP, "hook"))

    # --- what happens

    def declare_app(self, app: str) -> None:
        """Show the app's counters from the start, as 0: rates of a series that is not there are wrong."""
        self._failovers.setdefault(app, 0)

    def leader_acquired(self, app: str) -> None:
        """This node has acquired the leadership of *app*."""
        self._failovers[app] = self._failovers.get(app, 0) + 1

    def nats_disconnected(self) -> None:
        """The connection to NATS was lost."""
        self._disconnections += 1

    def observe_activation(self, app: str, seconds: float) -> None:
        """*app* became active, *seconds* after its epoch was acquired."""
        self._activation.observe((app,), seconds)

    def observe_stand_down(self, app: str, seconds: float) -> None:
        """An active section of *app* ended; that took *seconds*."""
        self._stand_down.observe((app,), seconds)

    def observe_hook(self, app: str, hook: str, seconds: float) -> None:
        """A hook (its name, such as ``on_active``) ran for *seconds*."""
        self._hooks.observe((app, hook), seconds)

    def observe_step(self, app: str, step: str, seconds: float) -> None:
        """A step of an activation or stand-down took *seconds*. Count and sum only: steps are many."""
        count, total = self._steps.get((app, step), (0, 0.0))
        self._steps[app, step] = (count + 1, total + seconds)

    def set_loop_lag(self, seconds: float) -> None:
        """How late the event loop was with a timer, the last time this was looked at."""
        self._loop_lag = seconds

    def read_renewals(self, total: Callable[[], int]) -> None:
        """At each scrape *total* is asked how many renewals of sessions were acknowledged so far."""
        self._renewals = total

    def read_undelivered(self, count: Callable[[], int]) -> None:
        """At each scrape *count* is asked how many audit entries wait to be delivered."""
        self._undelivered = count

    # --- what is shown

    def render(self, status: NodeStatus) -> bytes:
        """All metrics, of type :data:`CONTENT_TYPE`, with the gauges taken from *status*."""
        return generate_latest(_Snapshot([*self._of_node(status), *self._of_apps(status)]))

    def _of_node(self, status: NodeStatus) -> Iterator[Metric]:
        build = GaugeMetricFamily("phalanx_build_info", "Always 1; what runs.", labels=(*_NODE, "version"))
        build.add_metric((*self._common, self._version), 1)
        yield build
        for name, about, value in (
            ("phalanx_node_ready", "1 if the node is ready.", float(status.ready)),
            (
                "phalanx_session_left_seconds",
                "How long the session is still valid, if it is not renewed.",
                status.session_left_seconds,
            ),
            ("phalanx_nats_connected", "1 while connected to NATS.", float(status.connected)),
            (
                "phalanx_audit_undelivered_entries",
                "Audit entries that NATS has not acknowledged.",
                self._undelivered(),
            ),
            ("phalanx_loop_lag_seconds", "How late the event loop was with a timer.", self._loop_lag),
        ):
            gauge = GaugeMetricFamily(name, about, labels=_NODE)
            gauge.add_metric(self._common, value)
            yield gauge
        for name, about, total in (
            ("phalanx_session_renewals", "Acknowledged renewals of the session.", self._renewals()),
            ("phalanx_nats_disconnections", "Losses of the connection to NATS.", self._disconnections),
        ):
            counter = CounterMetricFamily(name, about, labels=_NODE)
            counter.add_metric(self._common, total)
            yield counter

    def _of_apps(self, status: NodeStatus) -> Iterator[Metric]:
        yield self._roles(status.apps)
        for name, about, value in _APP_GAUGES:
            gauge = GaugeMetricFamily(name, about, labels=_APP)
            for app in status.apps:
                gauge.add_metric((*self._common, app.name), value(app))
            yield gauge
        failovers = CounterMetricFamily("phalanx_failovers", "Leaderships this node acquired.", labels=_APP)
        for name, count in self._failovers.items():
            failovers.add_metric((*self._common, name), count)
        yield failovers
        steps = SummaryMetricFamily(
            "phalanx_step_seconds", "Steps of activations and stand-downs.", labels=(*_APP, "step")
        )
        for labels, (count, total) in self._steps.items():
            steps.add_metric((*self._common, *labels), count, total)
        yield steps
        for histogram in (self._activation, self._stand_down, self._hooks):
            yield histogram.metric(self._common)

    def _roles(self, apps: Sequence[AppStatus]) -> Metric:
        roles = GaugeMetricFamily(
            "phalanx_app_role",
            "1 for the role that the app has here, 0 for the others.",
            labels=(*_APP, "role"),
        )
        for app in apps:
            for role in Role:
                roles.add_metric((*self._common, app.name, role.value), float(app.role is role))
        return roles


_APP_GAUGES: tuple[tuple[str, str, Callable[[AppStatus], float]], ...] = (
    ("phalanx_app_active", "1 while the app is active here.", lambda app: float(app.role is Role.ACTIVE)),
    ("phalanx_app_epoch", "The epoch of the present leader, as known here.", lambda app: float(app.epoch)),
    (
        "phalanx_app_healthy",
        "0 when health checks fail; 1 when they pass, or there is no verdict (yet).",
        lambda app: float(app.health is not Health.UNHEALTHY),
    ),
)


class _Snapshot(Collector):
    """What one scrape gets."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics
