"""Events through kills, hand-overs and lost deliveries: at least once, in the order of each key."""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from tests.docs.pages import ROOT
from tests.e2e.test_events import Mails, User, platform_of
from tests.waiting import until

from phalanx import NatsOptions, Platform, Role
from phalanx.bus.connection import NatsBus
from phalanx.client import PlatformClient
from phalanx.names import Names
from phalanx.ports import Message
from phalanx.testing.nats import NatsCluster, NatsServer
from phalanx.testing.nodes import Nodes

NAMES = Names("test")
KEYS, STEPS = 5, 60


def read_marks(path: Path) -> dict[str, list[int]]:
    """What was begun, by key, in order."""
    found = defaultdict[str, list[int]](list)
    for line in path.read_text().splitlines() if path.exists() else ():
        key, number = line.split()
        found[key].append(int(number))
    return found


async def more_marks(path: Path, count: int) -> None:
    """Wait until *count* more events were begun."""
    before = sum(map(len, read_marks(path).values()))
    await until(lambda: sum(map(len, read_marks(path).values())) > before + count, 60)


def check_order(begun: dict[str, list[int]]) -> None:
    """No event was begun before the one before it of its key: earlier ones may come again, none is ahead."""
    for key, numbers in begun.items():
        highest = -1
        for number in numbers:
            assert number <= highest + 1, (key, numbers)
            highest = max(highest, number)


@pytest.mark.timeout(180)
async def test_leader_is_killed_while_it_handles_events_again_and_again(
    nats_cluster: NatsCluster, tmp_path: Path
) -> None:
    """Three SIGKILLs of the active node: each event of each key is handled, none before the one before it."""
    marks = tmp_path / "marks"
    command = [sys.executable, "-m", "tests.e2e.events_node", str(marks)]
    with Nodes(command, nats_cluster.urls, count=2, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}) as nodes:
        active = await nodes.wait_for_active("wiki")
        async with PlatformClient("test", NatsOptions(urls=tuple(nats_cluster.urls))) as client:
            events = client.events("wiki")

            async def publish() -> None:
                for step in range(STEPS):
                    for key in range(KEYS):
                        await events.publish("step.made", step, key=f"k{key}", timeout=30)
                    await asyncio.sleep(0.05)

            publishing = asyncio.create_task(publish())
            for _ in range(3):
                await more_marks(marks, 3 * KEYS)
                nodes[active].kill()
                killed, active = active, await nodes.wait_for_active("wiki", other_than=active)
                nodes[killed].start()
            await publishing
            await until(lambda: all(STEPS - 1 in numbers for numbers in read_marks(marks).values()), 60)
    begun = read_marks(marks)
    check_order(begun)
    assert {key: set(numbers) for key, numbers in begun.items()} == {
        f"k{key}": set(range(STEPS)) for key in range(KEYS)
    }


async def handled(mails: Mails, count: int) -> None:
    """Wait until so many different events were handled."""
    await until(lambda: len({event.data.age for event in mails.seen}) == count, 60)


async def two_nodes(nats: NatsServer, tmp_path: Path, **options: object) -> list[tuple[Platform, Mails]]:
    """Two nodes in this process with the same app, not started."""
    found: list[tuple[Platform, Mails]] = []
    for name in ("n1", "n2"):
        platform = platform_of(nats, tmp_path, name)
        found.append((platform, Mails(platform.app("wiki"), **options)))
    return found


async def test_hand_over_gives_what_is_not_done_to_the_next_leader_at_once(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """A handler that hangs is cancelled at the hand-over; its event and those behind it go on elsewhere."""
    nodes = await two_nodes(nats_server, tmp_path, ack_wait=3000)
    async with nodes[0][0], nodes[1][0]:
        active = await until(lambda: next((n for n in nodes if n[1].app.is_active), None))
        other = nodes[0] if active is nodes[1] else nodes[1]
        active[1].gate.clear()
        for number in range(20):
            await active[1].app.events.publish("user.made", User(f"u{number}", number), key="one")
        await until(lambda: other[1].app.role is Role.STANDBY and active[1].app.others_can())
        await active[1].app.step_down()
        await until(lambda: len(other[1].seen) == 20, 60)
        assert active[1].seen == []
        assert [event.data.age for event in other[1].seen] == list(range(20))


async def test_shared_consumer_hands_each_event_to_one_node(nats_server: NatsServer, tmp_path: Path) -> None:
    """Handlers declared ``anywhere`` run on all nodes, standbys too; each event is handled by one."""
    nodes = await two_nodes(nats_server, tmp_path, anywhere=True)
    async with nodes[0][0], nodes[1][0]:
        for _, mails in nodes:
            mails.gate.clear()
        for number in range(400):
            await nodes[0][1].app.events.publish("user.made", User(f"u{number}", number))
        for _, mails in nodes:
            mails.gate.set()
        await until(lambda: sum(len(mails.seen) for _, mails in nodes) >= 400)
        seen = [event.data.age for _, mails in nodes for event in mails.seen]
        assert sorted(seen) == list(range(400))
        assert all(mails.seen for _, mails in nodes)


async def test_delivery_that_somebody_swallowed_comes_again_before_what_is_behind_it(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Somebody else takes events from the leader's consumer and drops them: made good, and in order."""
    platform = platform_of(nats_server, tmp_path)
    mails = Mails(app := platform.app("wiki"), ack_wait=3000)
    thief = await NatsBus.connect(NatsOptions(urls=tuple(nats_server.urls)))
    stolen = list[Message]()
    await thief.subscribe("thief", stolen.append, direct=True)
    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{NAMES.events_stream('wiki')}.mailer"
        for number in range(300):
            if number % 50 == 0:
                thief.send(subject, b'{"batch": 3, "expires": 20000000000}', reply="thief")
            await app.events.publish("user.made", User(f"u{number}", number), key="one")
        await until(lambda: len(mails.seen) >= 300)
    assert len([message for message in stolen if message.reply]) >= 3
    assert [event.data.age for event in mails.seen] == list(range(300))
    await thief.close()


async def test_events_go_on_through_the_loss_of_any_server(nats_cluster: NatsCluster, tmp_path: Path) -> None:
    """Each server of a cluster is killed once: publishing goes on, each event is handled, in order."""
    platform = Platform(
        "test",
        node="n1",
        nats=nats_cluster.urls,
        data_dir=str(tmp_path / "n1"),
        http={"enabled": False},
        timings={"ttl": 10},
    )
    mails = Mails(app := platform.app("wiki"))
    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        number = 0
        for server in range(3):
            for _ in range(30):
                await app.events.publish("user.made", User("u", number), key="one", timeout=30)
                number += 1
                if number % 30 == 10:
                    nats_cluster.kill(server)
            await handled(mails, number)
            nats_cluster.start(server)
            await nats_cluster.ready()
        seen = [event.data.age for event in mails.seen]
    check_order({"one": seen})
    assert set(seen) == set(range(90))
