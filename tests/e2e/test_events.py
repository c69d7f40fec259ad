"""Events: published, handled, tried again, given up, replayed; under a fence, and through hand-overs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any as Value

import msgspec
import pytest
from tests.waiting import until

from phalanx import (
    ActiveContext,
    App,
    Backoff,
    Event,
    Events,
    Fenced,
    NatsOptions,
    Platform,
    Role,
    StartError,
)
from phalanx.bus import provision
from phalanx.bus.connection import NatsBus
from phalanx.client import PlatformClient
from phalanx.messaging.content import MSGPACK
from phalanx.messaging.dead_letters import DeadLetter
from phalanx.messaging.event_fence import EventFence
from phalanx.messaging.event_publishing import FencedPublisher
from phalanx.names import LEADER_KEY, Names
from phalanx.testing.nats import NatsServer

NAMES = Names("test")


class User(msgspec.Struct):
    name: str
    age: int = 0


def platform_of(nats: NatsServer, tmp_path: Path, name: str = "n1") -> Platform:
    """A node in this process, without apps."""
    return Platform(
        "test",
        node=name,
        nats=nats.urls,
        data_dir=str(tmp_path / name),
        http={"enabled": False},
        timings={"ttl": 5},
    )


class Mails:
    """An app that handles user events; what it was given is in ``seen``. A name in ``bad`` fails."""

    def __init__(self, app: App, **options: Value) -> None:
        self.app = app
        self.seen = list[Event[User]]()
        self.bad = set[str]()
        self.gate = asyncio.Event()
        self.gate.set()
        options = {"durable": "mailer", "retry": Backoff(first=0.05, longest=0.2), **options}

        @app.on_event("user.*", **options)
        async def mail(event: Event[User]) -> None:
            await self.gate.wait()
            self.seen.append(event)
            if event.data.name in self.bad:
                raise RuntimeError(f"no mail to {event.data.name}")

    @property
    def names(self) -> list[str]:
        """Of whom it was told, in order."""
        return [event.data.name for event in self.seen]


def client_of(nats: NatsServer) -> PlatformClient:
    """A client with all rights."""
    return PlatformClient("test", NatsOptions(urls=tuple(nats.urls)))


async def dead_of(nats: NatsServer) -> list[DeadLetter]:
    """All dead letters."""
    async with client_of(nats) as client:
        return [letter async for letter in client.dead_letters.list()]


async def test_event_is_handled_typed_and_once(nats_server: NatsServer, tmp_path: Path) -> None:
    """A published event reaches the handler with its data as annotated, key, sequence, time and attempt."""
    platform = platform_of(nats_server, tmp_path)
    mails = Mails(app := platform.app("wiki"))
    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        began = time.time()
        sequence = await app.events.publish(
            "user.created", User("ann", 7), key="ann", headers={"Via": "test"}, message_id="one"
        )
        again = await app.events.publish("user.created", User("ann", 7), message_id="one")
        await app.events.publish("user.created", User("bob"), content_type=MSGPACK)
        await app.events.publish("page.created", User("eve"))
        await until(lambda: len(mails.seen) == 2)
    event = mails.seen[0]
    assert again == sequence
    assert mails.names == ["ann", "bob"]
    assert (event.subject, event.data, event.key, event.attempt) == ("user.created", User("ann", 7), "ann", 1)
    assert event.sequence == sequence
    assert abs(event.time - began) < 60
    assert event.headers["Via"] == "test"
    assert event.id == "one"


async def test_failed_event_is_tried_again_and_its_key_waits(nats_server: NatsServer, tmp_path: Path) -> None:
    """While an event that failed waits for its next try, later ones of its key wait, others do not."""
    platform = platform_of(nats_server, tmp_path)
    mails = Mails(app := platform.app("wiki"), retries=50)
    mails.bad.add("ann-1")
    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        for name in ("ann-1", "ann-2", "ann-3", "bob-1", "bob-2"):
            await app.events.publish("user.created", User(name), key=name[:3])
        await until(lambda: "bob-2" in mails.names and mails.names.count("ann-1") >= 2)
        assert "ann-2" not in mails.names
        mails.bad.clear()
        await until(lambda: "ann-3" in mails.names)
    good = [name for name in mails.names if name != "ann-1"]
    assert [name for name in good if name.startswith("ann")] == ["ann-2", "ann-3"]
    assert [event.attempt for event in mails.seen if event.data.name == "ann-1"][:2] == [1, 2]


async def test_event_that_always_fails_becomes_a_dead_letter(nats_server: NatsServer, tmp_path: Path) -> None:
    """After its last retry it is a dead letter, its key goes on, and a retry goes to that handler alone."""
    platform = platform_of(nats_server, tmp_path)
    mails = Mails(app := platform.app("wiki"), retries=2)
    others = list[str]()

    @app.on_event("user.>", durable="other")
    async def other(event: Event[User]) -> None:
        others.append(event.data.name)

    mails.bad.add("ann")
    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        await app.events.publish("user.created", User("ann"), key="k", headers={"Via": "test"})
        await app.events.publish("user.created", User("bob"), key="k")
        await until(lambda: "bob" in mails.names)
        assert mails.names == ["ann", "ann", "ann", "bob"]
        async with client_of(nats_server) as client:
            (letter,) = [each async for each in client.dead_letters.list("wiki", "mailer")]
            assert (letter.app, letter.durable, letter.subject) == ("wiki", "mailer", "user.created")
            assert letter.reason == "RuntimeError: no mail to ann"
            assert (letter.attempts, letter.key, letter.headers["Via"]) == (3, "k", "test")
            assert msgspec.json.decode(letter.data) == {"name": "ann", "age": 0}
            mails.bad.clear()
            await client.dead_letters.retry(letter.number)
            await until(lambda: mails.names[-1] == "ann")
            assert [each async for each in client.dead_letters.list()] == []
        await app.events.publish("user.created", User("last"))
        await until(lambda: others[-1:] == ["last"])
    assert others == ["ann", "bob", "last"]


async def test_what_cannot_be_decoded_is_dead_at_once(nats_server: NatsServer, tmp_path: Path) -> None:
    """An event of another shape than the handler's is given up without a try, with the path of the field."""
    platform = platform_of(nats_server, tmp_path)
    mails = Mails(app := platform.app("wiki"))
    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        await app.events.publish("user.created", {"name": "ann", "age": "old"})
        await app.events.publish("user.created", User("bob"))
        await until(lambda: mails.names == ["bob"])
        (letter,) = await until(lambda: dead_of(nats_server))
    assert "$.age" in letter.reason
    assert letter.attempts == 1


class Reign:
    """A node's side of one reign over "wiki", without a node: the leader key is written by hand."""

    def __init__(self, bus: NatsBus, node: str) -> None:
        self.bus, self.fence = bus, EventFence(bus, NAMES, "wiki", node)
        self.epoch = 0

    async def lead(self) -> FencedPublisher:
        """Take the leader key, and seal."""
        subject = NAMES.key_subject(NAMES.app_bucket("wiki"), LEADER_KEY)
        self.epoch = await self.bus.write(subject, b"{}")
        return await self.seal()

    async def seal(self) -> FencedPublisher:
        """Seal under the present epoch."""
        sealed = await self.fence.seal(self.epoch)
        return FencedPublisher(self.bus, NAMES, "wiki", self.fence, sealed, self.epoch)


async def make_streams(bus: NatsBus, replicas: int = 1, max_bytes: int = 1 << 20) -> None:
    """The bucket and the events of app "wiki"."""
    bucket = NAMES.app_bucket("wiki")
    await provision.create_stream(
        bus, provision.bucket_config(NAMES, bucket, "wiki", history=8, replicas=replicas)
    )
    config = provision.events_config(
        NAMES, "wiki", max_age_seconds=3600, max_bytes=max_bytes, replicas=replicas
    )
    await provision.create_stream(bus, config)


async def stored(bus: NatsBus) -> list[str]:
    """The subjects of the app's events, in order."""
    records = await bus.read_log(NAMES.events_stream("wiki"), NAMES.event_subject("wiki", ">"))
    return [NAMES.event_of(record.subject) for record in records]


async def test_g2_deposed_leaders_event_is_refused_by_the_server(nats_server: NatsServer) -> None:
    """Once another reign has sealed, an event under the old one is refused, and it cannot seal again."""
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    await make_streams(bus)
    one, two = Reign(bus, "n1"), Reign(bus, "n2")
    old = await one.lead()
    await old.publish("a")
    new = await two.lead()
    with pytest.raises(Fenced):
        await old.publish("b")
    with pytest.raises(Fenced):
        await one.seal()
    await new.publish("c")
    assert await stored(bus) == ["a", "c"]
    await bus.close()


async def test_g2_fence_that_retention_took_is_written_anew_by_the_leader_alone(
    nats_server: NatsServer,
) -> None:
    """So many events came that the fence is gone: the leader publishes on, the deposed one does not."""
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    await make_streams(bus)
    one, two = Reign(bus, "n1"), Reign(bus, "n2")
    old = await one.lead()
    new = await two.lead()
    for _ in range(40):
        await bus.write(NAMES.event_subject("wiki", "large"), b"x" * 50_000)
    assert await bus.read(NAMES.events_stream("wiki"), NAMES.event_fence_subject("wiki")) is None
    with pytest.raises(Fenced):
        await old.publish("old")
    await new.publish("new")
    with pytest.raises(Fenced):
        await old.publish("old")
    subjects = await stored(bus)
    assert subjects[-1] == "new"
    assert "old" not in subjects
    await bus.close()


async def test_g2_leader_publishes_through_ctx_until_another_one_leads(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """What a section keeps of ``ctx.events`` is refused after a hand-over, and the next section's is not."""
    platforms = [platform_of(nats_server, tmp_path, name) for name in ("n1", "n2")]
    contexts = dict[str, ActiveContext]()
    for platform in platforms:
        app = platform.app("wiki", events=Events(max_age="1h"))

        @app.on_active
        async def active(ctx: ActiveContext) -> None:
            contexts[ctx.node] = ctx
            await ctx.events.publish("leads", {"node": ctx.node, "epoch": ctx.epoch})

    async with platforms[0], platforms[1]:
        first = await until(lambda: next(iter(contexts), ""))
        other = "n2" if first == "n1" else "n1"
        await until(lambda: platforms[0 if first == "n1" else 1].apps["wiki"].is_active)
        await until(lambda: platforms[0 if other == "n1" else 1].apps["wiki"].others_can())
        await platforms[0 if first == "n1" else 1].apps["wiki"].step_down()
        await until(lambda: other in contexts and platforms[0 if other == "n1" else 1].apps["wiki"].is_active)
        with pytest.raises(Fenced):
            await contexts[first].events.publish("stale")
        await contexts[other].events.publish("fresh", 1)
        found = list[Event[Value]]()
        async with platforms[0].apps["wiki"].events.subscribe(after=0) as reader:
            async for event in reader:
                found.append(event)
                if event.subject == "fresh":
                    break
    assert [event.subject for event in found] == ["leads", "leads", "fresh"]
    assert [event.data["node"] for event in found[:2]] == [first, other]


async def test_app_without_events_says_how_to_declare_them(nats_server: NatsServer, tmp_path: Path) -> None:
    """``app.events`` of an app that declares none is a StartError with the remedy."""
    platform = platform_of(nats_server, tmp_path)
    app = platform.app("wiki")
    with pytest.raises(StartError, match="while the platform runs"):
        _ = app.events
    async with platform:
        with pytest.raises(StartError, match="events=Events"):
            _ = app.events
