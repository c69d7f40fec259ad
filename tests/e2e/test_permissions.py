"""G5: a real server with the rendered configuration refuses what crosses an app's border."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError

from phalanx.bus import permissions
from phalanx.data.status import RESTORE_KEY
from phalanx.errors import ConfigError
from phalanx.testing.nats import NatsServer

USERS = ("prod-node", "prod-operator", "prod-viewer", "prod-app-wiki", "prod-app-shop")


class Door:
    """Logs in as any user, and remembers what the server refused."""

    def __init__(self, server: NatsServer, stack: AsyncExitStack) -> None:
        self._server, self._stack = server, stack
        self.refused: list[str] = []

    async def login(self, user: str) -> Client:
        """A connection of *user*; permission violations go to ``refused``."""

        async def note(error: Exception) -> None:
            self.refused.append(str(error))

        client = await nats.connect(self._server.url(), user=user, password=f"pw-{user}", error_cb=note)
        self._stack.push_async_callback(client.close)
        return client

    async def is_refused(self, client: Client, subject: str, data: bytes = b"") -> bool:
        """Whether the server says that *client* may not send to *subject*, and nobody answers."""
        spellings = {subject, subject.replace("$JS.API", DOMAIN)}
        return all([await self._is_refused(client, each, data) for each in spellings])

    async def _is_refused(self, client: Client, subject: str, data: bytes) -> bool:
        self.refused.clear()
        try:
            await client.request(subject, data, timeout=0.1)
        except NatsError:
            pass
        else:
            return False
        return any("permissions violation for publish" in each.lower() for each in self.refused)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """A server with two apps whose buckets exist, as Phalanx makes them."""
    conf = permissions.render("prod", ["wiki", "shop"], passwords={user: f"pw-{user}" for user in USERS})
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(NatsServer(extra=conf, system_user=False))
        door = Door(server, stack)
        node = await door.login("prod-node")
        for bucket, watch in (("wiki", "wiki"), ("shop", "shop"), ("platform", "_")):
            await api(
                node,
                f"STREAM.CREATE.KV_prod_{bucket}",
                name=f"KV_prod_{bucket}",
                subjects=[f"$KV.prod_{bucket}.>"],
                max_msgs_per_subject=8,
                allow_direct=True,
                allow_atomic=True,
                allow_msg_ttl=True,
                discard="new",
                republish={"src": f"$KV.prod_{bucket}.>", "dest": f"prod.{watch}.watch.kv.>"},
            )
        await api(node, "STREAM.CREATE.prod_audit", name="prod_audit", subjects=["prod._.audit.>"])
        for app, where in (("_wiki", "wiki"), ("_shop", "shop"), ("", "_")):
            await api(
                node,
                f"STREAM.CREATE.prod{app}_events",
                name=f"prod{app}_events",
                subjects=[f"prod.{where}.events.>", f"prod.{where}.fence.events"],
                allow_direct=True,
                republish={"src": f"prod.{where}.events.>", "dest": f"prod.{where}.watch.events.>"},
            )
        for app in ("wiki", "shop"):
            await node.request(f"prod.{app}.events.user.created", b"of " + app.encode())
            await node.request(f"$KV.prod_{app}.election.leader", b"n1")
            await node.request(f"$KV.prod_{app}.kv.secret", b"of " + app.encode())
        yield door


async def subscribed(client: Client) -> None:
    """Wait until the server knows all subscriptions of *client*.

    Twice, because the PING of nats-py's flush() overtakes commands that its flusher has yet to write.
    """
    await client.flush()
    await client.flush()


DOMAIN = "$JS.prod.API"
"""What the users that are no nodes write for ``$JS.API``."""


async def api(client: Client, subject: str, prefix: str = "$JS.API", **request: Any) -> dict[str, Any]:
    """A JetStream API request that must succeed."""
    answer = json.loads((await client.request(f"{prefix}.{subject}", json.dumps(request).encode())).data)
    assert "error" not in answer, answer
    return answer


async def test_app_user_reads_writes_and_watches_its_own(door: Door) -> None:
    """KV with compare-and-set, atomic batch, direct gets of one and of many, leader read, watch."""
    wiki = await door.login("prod-app-wiki")
    updates = await wiki.subscribe("prod.wiki.watch.kv.>")
    await subscribed(wiki)
    stored = await wiki.request(
        "$KV.prod_wiki.kv.a", b"1", headers={"Nats-Expected-Last-Subject-Sequence": "0"}
    )
    assert json.loads(stored.data)["seq"] == 3
    again = await wiki.request(
        "$KV.prod_wiki.kv.a", b"2", headers={"Nats-Expected-Last-Subject-Sequence": "0"}
    )
    assert json.loads(again.data)["error"]["err_code"] == 10071
    update = await updates.next_msg(2)
    assert update.data == b"1"
    assert update.subject.startswith("prod.wiki.watch.kv.")
    batch = {"Nats-Batch-Id": "b", "Nats-Batch-Sequence": "1"}
    await wiki.publish("$KV.prod_wiki.lock.l", b"x", headers=batch)
    commit = {"Nats-Batch-Id": "b", "Nats-Batch-Sequence": "2", "Nats-Batch-Commit": "1"}
    assert json.loads((await wiki.request("$KV.prod_wiki.kv.b", b"3", headers=commit)).data)["count"] == 2
    one = await wiki.request(f"{DOMAIN}.DIRECT.GET.KV_prod_wiki.$KV.prod_wiki.kv.b")
    assert one.data == b"3"
    last = await api(wiki, "STREAM.MSG.GET.KV_prod_wiki", DOMAIN, last_by_subj="$KV.prod_wiki.kv.a")
    assert last["message"]["seq"] == 3
    assert (await api(wiki, "STREAM.INFO.KV_prod_wiki", DOMAIN))["config"]["name"] == "KV_prod_wiki"
    assert await snapshot(wiki, "KV_prod_wiki", DOMAIN) == {b"n1", b"of wiki", b"1", b"x", b"3"}
    bucket = await wiki.jetstream(domain="prod").key_value("prod_wiki")
    assert (await bucket.get("kv.b")).value == b"3"
    await bucket.put("kv.b", b"4")
    await wiki.request(f"{DOMAIN}.$KV.prod_wiki.kv.b", b"5")  # as a Go client with a domain does it
    assert (await bucket.get("kv.b")).value == b"5"
    assert door.refused == []


async def test_app_user_publishes_reads_and_hears_its_own_and_the_platforms_events(door: Door) -> None:
    """A message is stored once and heard once, by whoever may: its app, and all apps for the platform's."""
    wiki, shop, node = [await door.login(user) for user in ("prod-app-wiki", "prod-app-shop", "prod-node")]
    own = await wiki.subscribe("prod.wiki.watch.events.>")
    platform = await shop.subscribe("prod._.watch.events.>")
    for client in (wiki, shop):
        await subscribed(client)
    stored = await wiki.request("prod.wiki.events.user.created", b"mine", headers={"Nats-Msg-Id": "1"})
    again = await wiki.request("prod.wiki.events.user.created", b"mine", headers={"Nats-Msg-Id": "1"})
    assert json.loads(stored.data)["seq"] == json.loads(again.data)["seq"] == 2
    assert json.loads(again.data)["duplicate"]
    assert (await own.next_msg(2)).data == b"mine"
    await wiki.request("prod._.events.weather", b"fine")
    assert (await platform.next_msg(2)).data == b"fine"
    for each in (own, platform):
        assert [message.data async for message in _rest(each)] == []
    one = await wiki.request(f"{DOMAIN}.DIRECT.GET.prod_wiki_events.prod.wiki.events.user.created")
    assert one.data == b"mine"
    assert (await api(node, "STREAM.INFO.prod_wiki_events"))["state"]["messages"] == 2
    assert (await api(node, "STREAM.INFO.prod_events"))["state"]["messages"] == 1
    assert await snapshot(wiki, "prod_wiki_events", DOMAIN) == {b"mine"}
    assert await snapshot(shop, "prod_events", DOMAIN) == {b"fine"}
    assert door.refused == []


async def _rest(subscription: Any) -> AsyncIterator[Any]:
    """What comes within a tenth of a second."""
    while True:
        try:
            yield await subscription.next_msg(0.1)
        except NatsError:
            return


async def snapshot(client: Client, stream: str, prefix: str = "$JS.API") -> set[bytes]:
    """All last values, by one direct get with many answers, as ports.Bus.snapshot does it."""
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    request = json.dumps({"multi_last": [">"], "batch": 100}).encode()
    await client.publish(f"{prefix}.DIRECT.GET.{stream}", request, reply=inbox)
    values: set[bytes] = set()
    while True:
        answer = await answers.next_msg(2)
        if (answer.headers or {}).get("Status"):
            await answers.unsubscribe()
            return values
        values.add(answer.data)


async def test_g5_foreign_reads_are_refused_by_the_server(door: Door) -> None:
    """Direct get, leader get, stream info, listing, consumers, watch subjects: nothing of another app."""
    wiki = await door.login("prod-app-wiki")
    one = json.dumps({"last_by_subj": "$KV.prod_shop.kv.secret"}).encode()
    consumer = json.dumps({"stream_name": "KV_prod_shop", "config": {"ack_policy": "none"}}).encode()
    for subject, data in (
        ("$JS.API.DIRECT.GET.KV_prod_shop.$KV.prod_shop.kv.secret", b""),
        ("$JS.API.DIRECT.GET.KV_prod_shop", one),
        ("$JS.API.STREAM.MSG.GET.KV_prod_shop", one),
        ("$JS.API.STREAM.INFO.KV_prod_shop", b""),
        ("$JS.API.STREAM.INFO.KV_prod_platform", b""),
        ("$JS.API.STREAM.LIST", b""),
        ("$JS.API.STREAM.NAMES", b""),
        ("$JS.API.CONSUMER.CREATE.KV_prod_shop", consumer),
        ("$JS.API.CONSUMER.CREATE.KV_prod_shop.c", consumer),
        ("$JS.API.CONSUMER.LIST.KV_prod_shop", b""),
        ("$JS.API.DIRECT.GET.prod_shop_events.prod.shop.events.user.created", b""),
        ("$JS.API.DIRECT.GET.prod_shop_events", b'{"multi_last": [">"]}'),
        ("$JS.API.STREAM.MSG.GET.prod_shop_events", b'{"seq": 1}'),
        ("$JS.API.STREAM.INFO.prod_shop_events", b""),
        ("$JS.API.CONSUMER.CREATE.prod_shop_events", consumer),
        ("$JS.API.CONSUMER.CREATE.prod_wiki_events.c", consumer),
        ("$JS.API.CONSUMER.MSG.NEXT.prod_shop_events.mailer", b""),
        ("$JS.API.DIRECT.GET.prod_dead", b'{"multi_last": [">"]}'),
        ("prod._.api.shop.any.query", b""),
    ):
        assert await door.is_refused(wiki, subject, data), subject
    node = await door.login("prod-node")
    for subject in (
        "prod.shop.watch.kv.>",
        "prod.shop.events.>",
        "prod.shop.watch.>",
        "prod.>",
        "$KV.prod_shop.>",
        "_R_.>",
        ">",
    ):
        door.refused.clear()
        heard = await wiki.subscribe(subject)
        await subscribed(wiki)
        await node.request("$KV.prod_shop.kv.secret", b"new")
        with pytest.raises(NatsError):
            await heard.next_msg(0.1)
        assert any("subscription" in each.lower() for each in door.refused), subject


async def test_g5_foreign_writes_are_refused_by_the_server(door: Door) -> None:
    """Another app's keys, any app's election keys, streams, purges: all refused, nothing stored."""
    wiki, node = await door.login("prod-app-wiki"), await door.login("prod-node")
    before = await snapshot(node, "KV_prod_shop")
    for subject, data in (
        ("$KV.prod_shop.kv.secret", b"evil"),
        ("$KV.prod_shop.lock.l", b"evil"),
        ("$KV.prod_wiki.election.leader", b"evil"),
        ("$KV.prod_shop.election.leader", b"evil"),
        ("$KV.prod_platform.member.n1", b"evil"),
        ("prod.wiki.wal.x", b"evil"),
        ("prod.shop.events.user.created", b"evil"),
        ("prod.wiki.fence.events", b"evil"),
        ("prod.wiki.dead.mailer.user.created", b"evil"),
        ("$JS.ACK.prod_shop_events.mailer.1.1.1.0.0", b"+ACK"),
        ("$JS.ACK.prod_wiki_events.mailer.1.1.1.0.0", b"+ACK"),
        ("prod.wiki.watch.kv.kv.a", b"evil"),
        ("prod._.audit.a.b", b"evil"),
        ("prod._.control.app.wiki.stepdown", b""),
        ("$JS.API.STREAM.PURGE.KV_prod_wiki", b""),
        ("$JS.API.STREAM.DELETE.KV_prod_wiki", b""),
        ("$JS.API.STREAM.CREATE.evil", json.dumps({"name": "evil", "subjects": ["evil"]}).encode()),
        ("$JS.API.CONSUMER.CREATE.KV_prod_wiki", json.dumps({"stream_name": "KV_prod_wiki"}).encode()),
    ):
        assert await door.is_refused(wiki, subject, data), subject
    assert await snapshot(node, "KV_prod_shop") == before
    assert b"evil" not in await snapshot(node, "KV_prod_wiki")


async def test_g5_answers_cannot_be_sent_to_a_foreign_key(door: Door) -> None:
    """The reply subject, which permissions do not cover, cannot carry an app's data into another's bucket."""
    wiki, node = await door.login("prod-app-wiki"), await door.login("prod-node")
    await wiki.request("$KV.prod_wiki.kv.mine", b"evil")
    mine = json.dumps({"last_by_subj": "$KV.prod_wiki.kv.mine"}).encode()
    many = json.dumps({"multi_last": ["$KV.prod_wiki.kv.mine"], "batch": 10}).encode()
    before = (await api(node, "STREAM.INFO.KV_prod_shop"))["state"]["last_seq"]
    for target in ("$KV.prod_shop.kv.secret", "$KV.prod_shop.election.leader", "$KV.prod_platform.identity"):
        await wiki.publish("$KV.prod_wiki.kv.other", b"x", reply=target)
        await wiki.publish("$JS.prod.API.DIRECT.GET.KV_prod_wiki.$KV.prod_wiki.kv.mine", b"", reply=target)
        await wiki.publish("$JS.prod.API.DIRECT.GET.KV_prod_wiki", many, reply=target)
        await wiki.publish("$JS.prod.API.STREAM.MSG.GET.KV_prod_wiki", mine, reply=target)
        await wiki.publish("$JS.prod.API.STREAM.INFO.KV_prod_wiki", b"", reply=target)
    await wiki.request("$KV.prod_wiki.kv.other", b"after all those")
    await asyncio.sleep(0.2)  # nothing tells of an answer that does not come
    assert (await api(node, "STREAM.INFO.KV_prod_shop"))["state"]["last_seq"] == before
    assert (await api(node, "STREAM.INFO.KV_prod_platform"))["state"]["last_seq"] == 0


async def test_inboxes_of_others_cannot_be_read(door: Door) -> None:
    """An app user that listens to all inboxes hears neither a node's nor another app's answers."""
    wiki, shop, node = [await door.login(user) for user in ("prod-app-wiki", "prod-app-shop", "prod-node")]
    heard = await wiki.subscribe("_INBOX.>")
    await subscribed(wiki)
    await shop.request("$JS.prod.API.DIRECT.GET.KV_prod_shop.$KV.prod_shop.kv.secret")
    await node.request("$JS.API.DIRECT.GET.KV_prod_shop.$KV.prod_shop.kv.secret")
    with pytest.raises(NatsError):
        await heard.next_msg(0.2)


async def test_viewer_reads_status_and_audit_and_writes_nothing(door: Door) -> None:
    """The viewer gathers the nodes' status and reads the audit log; apps and writes are closed to it."""
    viewer, node = await door.login("prod-viewer"), await door.login("prod-node")

    async def answer(message: Any) -> None:
        await message.respond(b"one")
        await message.respond(b"two")

    await node.subscribe("prod._.control.status", cb=answer)
    audit = await viewer.subscribe("prod._.audit.>")
    await subscribed(viewer)
    await node.request("prod._.audit.node.started", b"entry")
    assert (await audit.next_msg(2)).data == b"entry"
    inbox = viewer.new_inbox()
    answers = await viewer.subscribe(inbox)
    await viewer.publish("prod._.control.status", b"", reply=inbox)
    assert [(await answers.next_msg(2)).data for _ in range(2)] == [b"one", b"two"]
    assert (await api(viewer, "STREAM.MSG.GET.prod_audit", DOMAIN, seq=1))["message"]["subject"].endswith(
        "started"
    )
    assert (await api(viewer, "STREAM.INFO.KV_prod_platform", DOMAIN))["state"]["messages"] == 0
    for subject in (
        "$KV.prod_platform.identity",
        "prod._.audit.x.y",
        "$JS.API.STREAM.INFO.KV_prod_wiki",
        "$JS.API.STREAM.DELETE.prod_audit",
        "prod._.control.app.wiki.stepdown",
    ):
        assert await door.is_refused(viewer, subject), subject


async def test_node_user_can_do_all_that_the_bus_needs(door: Door) -> None:
    """Fenced and batched writes, republished watch, steering, streams, core requests, audit, $SRV."""
    node, other = await door.login("prod-node"), await door.login("prod-node")
    leader = json.loads((await node.request("$KV.prod_wiki.election.leader", b"n2")).data)["seq"]
    fence = {
        "Nats-Expected-Last-Subject-Sequence": str(leader),
        "Nats-Expected-Last-Subject-Sequence-Subject": "$KV.prod_wiki.election.leader",
    }
    assert "error" not in json.loads((await node.request("$KV.prod_wiki.kv.x", b"1", headers=fence)).data)
    watch = await other.subscribe("prod.wiki.watch.kv.>")
    served = await other.subscribe("prod._.api.wiki.any.query")
    await subscribed(other)
    await node.request("$KV.prod_wiki.kv.x", b"2", headers={"Nats-TTL": "5s"})
    assert (await watch.next_msg(2)).data == b"2"
    await api(node, "INFO")
    await api(node, "STREAM.CREATE.prod_sessions_1", name="prod_sessions_1", subjects=["prod._.session.1.>"])
    await api(node, "STREAM.DELETE.prod_sessions_1")
    shop = await door.login("prod-app-shop")
    wiki = await door.login("prod-app-wiki")
    assert await door.is_refused(shop, "prod._.api.wiki.any.query")
    calling = asyncio.create_task(wiki.request("prod._.api.wiki.any.query", b"q"))
    await (await served.next_msg(2)).respond(b"a")
    assert (await calling).data == b"a"


async def test_two_apps_may_call_a_third_when_told_so(door: Door) -> None:
    """With calls={...} the API of one app is open to several others, and to no more."""
    apps = ["wiki", "shop", "mail", "none"]
    conf = permissions.render(
        "prod",
        apps,
        calls={"wiki": ["mail"], "shop": ["mail"]},
        passwords={user: f"pw-{user}" for user in (*USERS[:3], *(f"prod-app-{a}" for a in apps))},
    )
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(NatsServer(extra=conf, system_user=False))
        door = Door(server, stack)
        node = await door.login("prod-node")

        async def answer(message: Any) -> None:
            await message.respond(b"post")

        await node.subscribe("prod._.api.mail.any.send", cb=answer)
        await subscribed(node)
        for app in ("wiki", "shop", "mail"):
            client = await door.login(f"prod-app-{app}")
            assert (await client.request("prod._.api.mail.any.send")).data == b"post"
        assert await door.is_refused(await door.login("prod-app-none"), "prod._.api.mail.any.send")


def test_operator_may_write_the_key_by_which_restores_are_asked_for() -> None:
    """The bus knows its name by itself: it is the one that is used."""
    assert f'"$KV.prod_wiki.{RESTORE_KEY}"' in permissions.render("prod", ["wiki"])


def test_passwords_come_from_the_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without passwords the text holds references only, which the server resolves."""
    conf = permissions.render("prod", ["my-wiki"])
    assert set(re.findall(r"password: (\S+)", conf)) == {
        "$PHALANX_NODE_PASSWORD",
        "$PHALANX_APP_MY_WIKI_PASSWORD",
        "$PHALANX_OPERATOR_PASSWORD",
        "$PHALANX_VIEWER_PASSWORD",
    }
    for variable in re.findall(r"password: \$(\S+)", conf):
        monkeypatch.setenv(variable, '"10k"')
    with NatsServer(extra=conf, system_user=False):
        pass


@pytest.mark.parametrize(
    ("platform", "apps", "calls", "message"),
    [
        ("Prod", ["wiki"], {}, "platform = 'Prod'"),
        ("prod", ["wi_ki"], {}, "apps = 'wi_ki'"),
        ("prod", ["platform"], {}, "reserved"),
        ("prod", ["wiki", "wiki"], {}, "twice"),
        ("prod", ["wiki"], {"wiki": ["x>"]}, "apps = 'x>'"),
        ("prod", ["wiki"], {"shop": ["wiki"]}, "calls = 'shop'"),
    ],
)
def test_wrong_names_are_refused(
    platform: str, apps: list[str], calls: dict[str, list[str]], message: str
) -> None:
    """A name that could widen a subject never reaches the configuration."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        permissions.render(platform, apps, calls=calls)
