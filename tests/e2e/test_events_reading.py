"""Subscriptions, bad input, retention, other declarations: what events do besides being handled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any as Value

import msgspec
import pytest
from tests.e2e.test_events import NAMES, Mails, User, make_streams, platform_of
from tests.waiting import until

from phalanx import ConfigError, Event, EventError, Events, EventsLost, NatsOptions, Platform, Pool, Role
from phalanx.bus.connection import NatsBus
from phalanx.client import PlatformClient
from phalanx.messaging import events as messaging
from phalanx.testing.nats import NatsServer


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[NatsBus]:
    """A connection to a server that has the events of app "wiki", of a megabyte."""
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    await make_streams(bus)
    yield bus
    await bus.close()


def wiki_events(bus: NatsBus) -> messaging.Events:
    """The events of app "wiki", without a node."""
    return messaging.Events.over(lambda: bus, NAMES, "wiki")


async def take(reader: Value, count: int) -> list[Value]:
    """The data of the next *count* events."""
    async with asyncio.timeout(20):
        return [(await anext(reader)).data for _ in range(count)]


async def test_subscription_reads_from_a_time_a_sequence_or_now_and_goes_on(bus: NatsBus) -> None:
    """``since``, ``after`` and neither; a pattern; and whatever comes while it waits, in order."""
    events = wiki_events(bus)
    sequences = [await events.publish("user.created", number) for number in range(3)]
    await events.publish("page.created", "other")
    await asyncio.sleep(0.02)  # so that the next ones are later
    middle = time.time()
    await asyncio.sleep(0.02)
    await events.publish("user.created", 3)
    async with (
        events.subscribe("user.*", int, after=0) as all_of_them,
        events.subscribe("user.*", int, after=sequences[1]) as after,
        events.subscribe("user.*", int, since=middle) as since,
        events.subscribe("user.*", int) as new,
    ):
        waiting = asyncio.create_task(take(new, 300))
        for number in range(4, 304):
            await events.publish("user.created", number, key=str(number))
        assert await take(all_of_them, 304) == list(range(304))
        assert await take(after, 302) == list(range(2, 304))
        assert await take(since, 301) == list(range(3, 304))
        assert await waiting == list(range(4, 304))
    with pytest.raises(StopAsyncIteration):
        await anext(new)


async def test_subscription_says_what_was_dropped_and_what_is_of_another_type(bus: NatsBus) -> None:
    """EventsLost once for what retention took, EventError for one that is no int; then it goes on."""
    events = wiki_events(bus)
    first = await events.publish("a", 1)
    for _ in range(40):
        await events.publish("large", "x" * 50_000)
    await events.publish("a", "no number")
    last = await events.publish("a", 2)
    async with events.subscribe("a", int, after=first) as reader:
        with pytest.raises(EventsLost) as lost:
            await anext(reader)
        assert first < lost.value.first <= lost.value.last < last
        with pytest.raises(EventError, match=r"sequence \d+\) cannot be read as declared"):
            await anext(reader)
        assert (await anext(reader)).data == 2
    with pytest.raises(EventError, match="no stream test_none_events"):
        await anext(messaging.Events.over(lambda: bus, NAMES, "none").subscribe())


@pytest.mark.parametrize(
    ("subject", "options", "problem"),
    [
        ("", {}, "no subject"),
        ("user..created", {}, "no subject"),
        ("user.*", {}, "pattern"),
        ("user created", {}, "no subject"),
        ("x" * 256, {}, "longer than 255"),
        ("a", {"key": "x" * 300}, "no key"),
        ("a", {"message_id": "two words"}, "no id"),
        ("a", {"headers": {"Nats-Msg-Id": "1"}}, "no name for a header"),
        ("a", {"headers": {"Via": "two\nlines"}}, "not one line"),
        ("a", {"content_type": "text/plain"}, "unknown"),
        ("a", {"timeout": 0}, "out of range"),
        ("a", {"data": object()}, "cannot be sent"),
        ("a", {"data": "x" * 2_000_000}, "more than the"),
    ],
)
async def test_what_cannot_be_published_is_refused(
    bus: NatsBus, subject: str, options: dict[str, Value], problem: str
) -> None:
    """A typed error that says what to do, and nothing is stored."""
    with pytest.raises((ConfigError, EventError), match=problem):
        await wiki_events(bus).publish(subject, **options)
    assert (await bus.api(f"STREAM.INFO.{NAMES.events_stream('wiki')}", {}))["state"]["messages"] == 0


async def test_keys_of_any_text_arrive(bus: NatsBus) -> None:
    """A key may hold spaces, colons, per cent signs, and what is not ASCII."""
    events, keys = wiki_events(bus), ["a b", "ä/ö: %", "%41", "", "plain"]
    for key in keys:
        await events.publish("a", key=key)
    async with events.subscribe(after=0) as reader:
        assert [(await anext(reader)).key for _ in keys] == keys


def test_wrong_declarations_are_refused(tmp_path: Path) -> None:
    """A durable that is declared twice, wrong patterns, names, functions and numbers: ConfigErrors."""
    app = Platform("test", node="n1", nats="nats://127.0.0.1:1", data_dir=str(tmp_path)).app("wiki")

    async def good(event: Event[int]) -> None: ...
    async def wrong(event: int) -> None: ...
    async def none() -> None: ...
    def plain(event: Event[int]) -> None: ...

    app.on_event("a", durable="one")(good)
    for pattern, function, options, problem in (
        ("b", good, {"durable": "one"}, "declared twice"),
        ("a.>.b", good, {"durable": "two"}, "not its last token"),
        ("a", good, {"durable": "under_score"}, "no name of a durable"),
        ("a", wrong, {"durable": "two"}, "not an Event"),
        ("a", none, {"durable": "two"}, "other parameters"),
        ("a", plain, {"durable": "two"}, "not an async function"),
        ("a", good, {"durable": "two", "retries": -1}, "out of range"),
        ("a", good, {"durable": "two", "concurrency": 0}, "out of range"),
        ("a", good, {"durable": "two", "ack_wait": 0}, "out of range"),
        ("a", good, {"durable": "two", "start": "later"}, "neither all nor new"),
    ):
        with pytest.raises(ConfigError, match=problem):
            app.on_event(pattern, **options)(function)  # type: ignore[arg-type]


async def test_durable_goes_on_with_another_declaration_and_after_it_was_deleted(
    nats_server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed ack_wait is taken over, what was handled stays so; a deleted one is made anew, and told."""
    platform = platform_of(nats_server, tmp_path)
    mails = Mails(app := platform.app("wiki"))
    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        await app.events.publish("user.made", User("ann"))
        await until(lambda: mails.names == ["ann"])
    platform = platform_of(nats_server, tmp_path)
    mails = Mails(app := platform.app("wiki"), ack_wait=60)
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    consumer = f"{NAMES.events_stream('wiki')}.mailer"
    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        await app.events.publish("user.made", User("bob"))
        await until(lambda: mails.names == ["bob"])
        assert (await bus.api(f"CONSUMER.INFO.{consumer}", {}))["config"]["ack_wait"] == 60_000_000_000
        await bus.api(f"CONSUMER.DELETE.{consumer}", {})
        await app.events.publish("user.made", User("eve"))
        await until(lambda: "eve" in mails.names, 40)
    assert "consumer-vanished" in caplog.text
    await bus.close()


async def test_what_was_dropped_before_a_durable_saw_it_is_reported(
    nats_server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While nobody handles events, more come than are kept: the next leader says so, and handles the rest."""

    def node() -> tuple[Platform, Mails]:
        platform = platform_of(nats_server, tmp_path)
        return platform, Mails(platform.app("wiki", events=Events(max_bytes="1 MiB")))

    platform, mails = node()
    async with platform:
        await mails.app.wait_for_role(Role.ACTIVE, timeout=20)
        await mails.app.events.publish("user.made", User("ann"))
        await until(lambda: mails.names == ["ann"])
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    events = wiki_events(bus)
    for number in range(40):
        await events.publish("user.made", User("x" * 50_000, number))
    await bus.close()
    platform, mails = node()
    async with platform:
        await until(lambda: mails.seen and mails.seen[-1].data.age == 39)
        await until(lambda: "events-lost" in caplog.text)
        async with PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client:
            entries = await until(lambda: lost_entries(client))
    assert len(mails.seen) < 40
    assert "mailer" in entries[0].reason


async def lost_entries(client: PlatformClient) -> list[Value]:
    """The audit entries that tell of dropped events."""
    return [entry for entry in await client.audit() if entry.action == "events-lost"]


async def test_platforms_events_reach_every_app_that_wants_them(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Two apps, one of them a pool, handle the platform's events, published by a node and a sync client."""
    platform = platform_of(nats_server, tmp_path)
    wiki, shop = platform.app("wiki"), platform.app("shop", Pool())
    heard: dict[str, list[Value]] = {"wiki": [], "shop": []}

    @wiki.on_event("deploy.*", durable="deploys", of_platform=True)
    async def wiki_heard(event: Event[Value]) -> None:
        heard["wiki"].append(event.data)

    @shop.on_event("deploy.*", durable="deploys", of_platform=True, anywhere=True)
    async def shop_heard(event: Event[Value]) -> None:
        heard["shop"].append(event.data)

    def in_a_thread() -> Value:
        with (
            PlatformClient("test", NatsOptions(urls=tuple(nats_server.urls))) as client,
            client.events().subscribe("deploy.*", after=0) as reader,
        ):
            client.events().publish("deploy.done", 2)
            found = [next(reader).data, next(reader).data]
            return found, reader.next_within(0.05)

    async with platform:
        await wiki.wait_for_role(Role.ACTIVE, timeout=20)
        await platform.events.publish("deploy.done", 1)
        assert await asyncio.to_thread(in_a_thread) == ([1, 2], None)
        await until(lambda: all(data == [1, 2] for data in heard.values()))


async def test_metrics_count_events(nats_server: NatsServer, tmp_path: Path) -> None:
    """Published, handled, failed, dead, pending: by app and durable consumer."""
    platform = platform_of(nats_server, tmp_path)
    mails = Mails(app := platform.app("wiki"), retries=0)
    mails.bad.add("ann")
    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        for name in ("ann", "bob", "eve"):
            await app.events.publish("user.made", User(name))
        counts = await until(lambda: [each for each in app.event_counts() if each.dead and each.handled == 2])
        assert msgspec.structs.astuple(counts[0]) == ("wiki", "mailer", 0, 2, 1, 1, 0)
        assert [each.published for each in app.event_counts() if not each.durable] == [3]
