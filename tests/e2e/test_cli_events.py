"""``phalanx events``: what an operator sees and does, with the operator's login."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_events import Mails
from tests.waiting import until

from phalanx import Event, Platform, Role
from phalanx.bus import permissions
from phalanx.cli.main import run
from phalanx.testing.nats import NatsServer

USERS = ("test-node", "test-operator", "test-viewer", "test-app-wiki")


@pytest.fixture
def server() -> Iterator[NatsServer]:
    """A server with the permissions that are printed."""
    conf = permissions.render("test", ["wiki"], passwords={user: f"pw-{user}" for user in USERS})
    with NatsServer(extra=conf, system_user=False) as server:
        yield server


def url_of(server: NatsServer, user: str) -> str:
    """Where that user logs in."""
    return server.url().replace("://", f"://{user}:pw-{user}@")


class Called:
    """The command line, called in a thread of this process: a process for each takes seconds."""

    def __init__(self, capsys: pytest.CaptureFixture[str], url: str) -> None:
        self._capsys, self._where = capsys, ("--platform", "test", "--nats", url)

    async def call(self, *words: str, code: int = 0) -> tuple[str, str]:
        """Run a command, which must end with *code*: what it printed, and its errors."""
        self._capsys.readouterr()
        ended = await asyncio.to_thread(run, (*words, *self._where))
        out, err = self._capsys.readouterr()
        assert ended == code, (words, ended, out, err)
        return out, err

    async def json(self, *words: str) -> Any:
        """What it prints with --json."""
        return json.loads((await self.call(*words, "--json"))[0])


@pytest.fixture
def phalanx(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: NatsServer
) -> Called:
    """The command line with the operator's login."""
    monkeypatch.setenv("PHALANX_NATS", "")  # a command leaves its options there; not so to other tests
    return Called(capsys, url_of(server, "test-operator"))


@pytest.mark.timeout(300)
async def test_operator_publishes_follows_and_deals_with_dead_letters(
    server: NatsServer, tmp_path: Path, phalanx: Called
) -> None:
    """publish, tail, consumers, dead list, show, retry, delete: on an app's events and the platform's."""
    platform = Platform(
        "test",
        node="n1",
        nats=url_of(server, "test-node"),
        data_dir=str(tmp_path / "n1"),
        http={"enabled": False},
        timings={"ttl": 10},
    )
    mails = Mails(app := platform.app("wiki"), retries=0)
    platform.app("shop")
    mails.bad.add("ann")
    weather = list[Event[str]]()

    @app.on_event("weather.*", durable="weather", of_platform=True)
    async def note(event: Event[str]) -> None:
        weather.append(event)

    async with platform:
        await app.wait_for_role(Role.ACTIVE, timeout=20)
        ann = '{"name": "ann"}'
        out, _ = await phalanx.call("events", "publish", "wiki", "user.created", ann, "--key", "k")
        assert "user.created: sequence " in out
        await phalanx.call("events", "publish", "_", "weather.fine", '"sun"', "--id", "1")
        await phalanx.call("events", "publish", "_", "weather.fine", '"sun"', "--id", "1")
        await phalanx.call("events", "publish", "wiki", "user.created", '{"name": "bob"}')
        await until(lambda: mails.names == ["ann", "bob"] and weather)
        tailed, _ = await phalanx.call("events", "tail", "wiki", "--since", "1h", "--limit", "2", "--json")
        shown = [json.loads(line) for line in tailed.splitlines()]
        assert [event["data"] for event in shown] == [{"name": "ann"}, {"name": "bob"}]
        assert shown[0]["key"] == "k"
        assert "weather.fine" in (await phalanx.call("events", "tail", "--since", "1h", "--limit", "1"))[0]
        await until(lambda: dead_of_operator(phalanx))
        (letter,) = (await phalanx.json("events", "dead", "list", "wiki", "--durable", "mailer"))["dead"]
        assert (letter["durable"], letter["reason"]) == ("mailer", "RuntimeError: no mail to ann")
        assert letter["data"] == {"name": "ann"}
        number = str(letter["number"])
        assert '"Phalanx-Dead-Reason"' in (await phalanx.call("events", "dead", "show", number))[0]
        assert "no mail to ann" in (await phalanx.call("events", "dead", "list"))[0]
        found = (await phalanx.json("events", "consumers"))["consumers"]
        heads = ("stream", "app", "durable", "pattern", "dead")
        assert [tuple(view[head] for head in heads) for view in found] == [
            ("_", "wiki", "weather", "weather.*", 0),
            ("wiki", "wiki", "mailer", "user.*", 1),
        ]
        assert "mailer" in (await phalanx.call("events", "consumers", "wiki"))[0]
        mails.bad.clear()
        await phalanx.call("events", "dead", "retry", number)
        await until(lambda: mails.names == ["ann", "bob", "ann"])
        mails.bad.add("eve")
        await phalanx.call("events", "publish", "wiki", "user.created", '{"name": "eve"}')
        await until(lambda: dead_of_operator(phalanx))
        (last,) = (await phalanx.json("events", "dead", "list"))["dead"]
        assert "deleted" in (await phalanx.call("events", "dead", "delete", str(last["number"])))[0]
        assert "no dead letters" in (await phalanx.call("events", "dead", "list"))[0]
        await refusals(phalanx)


async def dead_of_operator(phalanx: Called) -> bool:
    """Whether there are dead letters."""
    return bool((await phalanx.json("events", "dead", "list"))["dead"])


async def refusals(phalanx: Called) -> None:
    """Each wrong input is one line that says what to do."""
    for words, expected in (
        (("publish", "wiki", "user..x", "1"), "no subject of an event"),
        (("publish", "wiki", "user.*", "1"), "pattern"),
        (("publish", "wiki", "user.x", "{"), "JSON"),
        (("publish", "wiki", "user.x", "1", "--wait", "0"), "--wait"),
        (("publish", "none", "user.x", "1"), "no such app"),
        (("publish", "shop", "user.x", "1"), "no events of its own"),
        (("tail", "none"), "no such app"),
        (("tail", "wiki", "--since", "soon"), "--since"),
        (("tail", "wiki", "--subject", "a.>.b"), "subject"),
        (("dead", "list", "--durable", "none"), "choose from: mailer, weather"),
        (("dead", "show", "4711"), "no dead letter"),
        (("dead", "retry", "4711"), "no dead letter"),
        (("dead", "delete"), "none is given"),
    ):
        out, err = await phalanx.call("events", *words, code=2)
        assert out == ""
        assert expected in err, (words, err)
        assert len(err.splitlines()) == 1
