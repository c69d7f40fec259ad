"""Events under odd conditions: late publishers, equal names, handlers that do not end, letters too large."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
import pytest
from tests.e2e.test_events import (
    NAMES,
    Mails,
    Reign,
    User,
    client_of,
    dead_of,
    make_streams,
    platform_of,
    stored,
)
from tests.waiting import until

from phalanx import AppContext, Event, Events, Fenced, NatsOptions, Role
from phalanx.bus.connection import NatsBus
from phalanx.errors import BusError
from phalanx.messaging.event_fence import FenceBody
from phalanx.messaging.event_handlers import EventHandlers
from phalanx.messaging.event_serving import EventServer
from phalanx.names import LEADER_KEY
from phalanx.ports import Message
from phalanx.testing.nats import NatsServer


def ignore(action: str, reason: str) -> None:
    """A report that nobody reads."""


async def test_g2_old_reign_that_first_publishes_after_this_node_leads_again_is_refused(
    nats_server: NatsServer,
) -> None:
    """Events of an earlier reign of the very node are not let pass under the seal of its present one."""
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    await make_streams(bus)
    leader = NAMES.key_subject(NAMES.app_bucket("wiki"), LEADER_KEY)
    server = EventServer("wiki", "n1", EventHandlers("wiki"), bus, NAMES, ignore, has_own=True)
    epochs = [await bus.write(leader, b"{}")]
    await server.seal(epochs[0])
    old = server.active(epochs[0])
    epochs.append(await bus.write(leader, b"{}"))
    await server.seal(epochs[1])
    new = server.active(epochs[1])
    with pytest.raises(Fenced):
        await old.publish("stale")
    await new.publish("fresh")
    with pytest.raises(Fenced):
        await old.publish("stale")
    await bus.close()


async def test_dead_letters_of_two_apps_about_one_event_of_the_platform_are_both_kept(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Two apps handle the platform's events under one durable name: each has a letter of its own."""
    platform = platform_of(nats_server, tmp_path)
    apps = [platform.app(name) for name in ("wiki", "shop")]
    for app in apps:
        Mails(app, of_platform=True, retries=0).bad.add("ann")
    async with platform:
        for app in apps:
            await app.wait_for_role(Role.ACTIVE, timeout=20)
        await platform.events.publish("user.created", User("ann"))
        await until(lambda: all(next(iter(app.event_handlers)).dead for app in apps))
        letters = await dead_of(nats_server)
    assert sorted(letter.app for letter in letters) == ["shop", "wiki"]


async def test_handler_that_does_not_end_keeps_no_node_from_stopping_its_app(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """``on_stop`` runs, and what comes after it, though a handler that runs anywhere goes on."""
    platform = platform_of(nats_server, tmp_path)
    app = platform.app("wiki")
    begun, free, stopped = asyncio.Event(), asyncio.Event(), list[str]()

    @app.on_event("user.*", durable="mailer", anywhere=True)
    async def mail(event: Event[User]) -> None:
        begun.set()
        while not free.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await free.wait()

    @app.on_stop
    async def stop(ctx: AppContext) -> None:
        stopped.append(ctx.node)

    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        await app.events.publish("user.created", User("ann"))
        await asyncio.wait_for(begun.wait(), 20)
    free.set()
    assert stopped == ["n1"]
    assert app.role is Role.STOPPED


@pytest.mark.parametrize("other_bytes", [400, 0])
async def test_event_as_large_as_a_message_becomes_a_dead_letter(
    nats_server: NatsServer, tmp_path: Path, other_bytes: int
) -> None:
    """What others have published without room for the letter's headers does not block its key for ever."""
    platform = platform_of(nats_server, tmp_path)
    mails = Mails(app := platform.app("wiki"))
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    subject = NAMES.event_subject("wiki", "user.created")
    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        head = {"Phalanx-Key": "k", "Via": "x" * other_bytes}
        body = b'{"name": 1, "more": "' + b"x" * (bus.max_payload - 250 - 2 * other_bytes) + b'"}'
        sequence = await bus.write(subject, body, headers=head)
        await app.events.publish("user.created", User("bob"), key="k")
        await until(lambda: mails.names == ["bob"])
        (found,) = await until(lambda: dead_of(nats_server))
        async with client_of(nats_server) as client:
            letter = await client.dead_letters.get(found.number)
            assert (letter.sequence, letter.key, letter.data == body) == (sequence, "k", True)
            again = await client.dead_letters.retry(letter.number)
            assert again > sequence
        await until(lambda: dead_of(nats_server))
    await bus.close()


async def test_section_that_ends_leaves_no_worker_behind_though_a_handler_swallows_its_cancellation(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A handler that is cancelled and returns all the same ends with its worker."""
    platform = platform_of(nats_server, tmp_path)
    app = platform.app("wiki")
    begun = asyncio.Event()

    @app.on_event("user.*", durable="mailer")
    async def mail(event: Event[User]) -> None:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        await app.events.publish("user.created", User("ann"))
        await asyncio.wait_for(begun.wait(), 20)
    left = [task.get_name() for task in asyncio.all_tasks() if "events wiki/mailer" in task.get_name()]
    assert left == []


async def test_fence_is_written_anew_while_others_publish_without_a_pause(nats_server: NatsServer) -> None:
    """Retention took the fence, and events of other nodes come faster than one can look: a leader begins."""
    bus, other = [await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls))) for _ in range(2)]
    await make_streams(bus)
    flooding = True

    async def flood() -> None:
        while flooding:
            with contextlib.suppress(BusError):
                await other.write(NAMES.event_subject("wiki", "large"), b"x" * 2_000)

    floods = [asyncio.create_task(flood()) for _ in range(8)]
    try:
        reign = Reign(bus, "n1")
        reign.epoch = await bus.write(NAMES.key_subject(NAMES.app_bucket("wiki"), LEADER_KEY), b"{}")
        sealed = await reign.fence.seal(reign.epoch, timeout=20)
        assert sealed.revision > 0
    finally:
        flooding = False
        await asyncio.gather(*floods)
    with pytest.raises(Fenced):
        await reign.fence.seal(reign.epoch - 1)
    await bus.close()
    await other.close()


async def test_g2_fence_of_a_deposed_leader_that_was_written_late_lets_nobody_publish(
    nats_server: NatsServer,
) -> None:
    """It comes once retention has taken the present leader's: no deposed one gets past."""
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    await make_streams(bus)
    reigns = [Reign(bus, name) for name in ("n1", "n2", "n3")]
    publishers = [await reign.lead() for reign in reigns]
    for _ in range(40):
        await bus.write(NAMES.event_subject("wiki", "large"), b"x" * 50_000)
    body = msgspec.json.encode(FenceBody(reigns[0].epoch, "n1"))
    await bus.write(NAMES.event_fence_subject("wiki"), body)
    for publisher in publishers[:2]:
        with pytest.raises(Fenced):
            await publisher.publish("old")
    await publishers[2].publish("new")
    assert "old" not in await stored(bus)
    await bus.close()


async def test_app_whose_consumer_cannot_be_made_is_stopped_again(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The node does not start; what the app had begun by then, its database say, is not left running."""
    first = platform_of(nats_server, tmp_path)
    first.app("wiki", events=Events())
    async with first:
        pass
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    stream = NAMES.events_stream("wiki")
    config = {"durable_name": "mailer", "name": "mailer", "ack_policy": "none"}
    await bus.api(f"CONSUMER.CREATE.{stream}.mailer", {"stream_name": stream, "config": config})
    await bus.close()
    second = platform_of(nats_server, tmp_path)
    app, stopped = second.app("wiki"), list[str]()
    Mails(app)

    @app.on_stop
    async def stop(ctx: AppContext) -> None:
        stopped.append(ctx.node)

    with pytest.raises(BusError):
        await second.start()
    await second.stop()
    assert stopped == ["n1"]
    assert app.role is Role.STOPPED


async def test_delivered_events_far_apart_in_a_busy_stream_come_again_at_once(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Two that a dead node had, with thousands of other subjects between: neither waits for ack_wait."""
    first = platform_of(nats_server, tmp_path)
    Mails(first.app("wiki"), ack_wait=3000)
    async with first:
        await first.apps["wiki"].wait_for_role(Role.ACTIVE, timeout=20)
    bus = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    taken = list[Message]()
    await bus.subscribe("thief", taken.append, direct=True)
    user, page = (NAMES.event_subject("wiki", name) for name in ("user.made", "page.made"))
    await bus.write(user, b'{"name": "u0"}')
    for _ in range(24):
        for _ in range(500):
            bus.send(page, b"{}")
        await bus.write(page, b"{}")
    await bus.write(user, b'{"name": "u1"}')
    pull = f"$JS.API.CONSUMER.MSG.NEXT.{NAMES.events_stream('wiki')}.mailer"
    bus.send(pull, b'{"batch": 2, "expires": 20000000000}', reply="thief")
    await until(lambda: len(taken) >= 2)
    second = platform_of(nats_server, tmp_path)
    mails = Mails(second.app("wiki"), ack_wait=3000)
    async with second:
        await until(lambda: mails.names == ["u0", "u1"])
    await bus.close()
