"""A node's part in apps that hold: whom it asks, and what it takes for an answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.waiting import until

from phalanx import system
from phalanx.coord import hold
from phalanx.coord.direct import Answer
from phalanx.coord.hold import Holds
from phalanx.coord.session import Session
from phalanx.decide.hold import Ask, Claim, MemberList
from phalanx.decide.timing import Timing
from phalanx.keeper import wire
from phalanx.keeper.wishes import Wishes
from phalanx.types import Resource, SessionId

TIMING = Timing.of(1.0)


class Sent:
    """Takes down what would be sent."""

    def __init__(self) -> None:
        self.asks: list[tuple[str, Ask]] = []

    def ask(self, address: tuple[str, int], to: str, ask: Ask) -> None:
        """See Direct."""
        self.asks.append((to, ask))


def leading(holds: Holds, nodes: dict[str, str], session: SessionId) -> tuple[Claim, Sent]:
    """An app of n1, whose session has just run out, and what it asks."""
    claim = holds.begin("wiki", 5, Session(session, TIMING))
    claim.on_list(7, MemberList(nodes, 1.0))
    sent: Any = Sent()
    holds.direct = sent
    return claim, sent


async def asking(holds: Holds, sent: Sent, count: int) -> None:
    """Let it ask so often."""
    task = asyncio.create_task(holds.run())
    try:
        await until(lambda: len(sent.asks) >= count or task.done())
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_name_server_that_does_not_answer_costs_only_the_promise_of_that_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others are asked all the same, one look-up is under way, and nothing fails."""
    lookups: list[str] = []

    async def resolve(address: str) -> tuple[str, int] | None:
        lookups.append(address)
        if address.startswith("deaf"):
            await asyncio.sleep(60)
        return "127.0.0.1", 1

    monkeypatch.setattr(hold, "resolve", resolve)
    holds = Holds(TIMING, "n1", lambda app: True)
    _, sent = leading(holds, {"n1": "h1:1", "n2": "deaf:1", "n3": "h3:1"}, SessionId("n1", "a"))
    await asking(holds, sent, 20)
    assert {to for to, _ in sent.asks} == {"n3"}
    assert sorted(lookups) == ["deaf:1", "h3:1"]


async def test_node_that_moves_to_another_address_is_asked_there_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its name is looked up again, and what was found first is kept while the name server says nothing."""
    found: list[tuple[str, int] | None] = [("127.0.0.1", 1), None, ("127.0.0.2", 1)]

    async def resolve(address: str) -> tuple[str, int] | None:
        return found.pop(0) if len(found) > 1 else found[0]

    places: list[tuple[str, int]] = []

    class Asked:
        def ask(self, address: tuple[str, int], to: str, ask: Ask) -> None:
            places.append(address)

    monkeypatch.setattr(hold, "resolve", resolve)
    monkeypatch.setattr(hold, "LOOK_UP_SECONDS", 0.05)
    holds = Holds(TIMING, "n1", lambda app: True)
    leading(holds, {"n1": "h1:1", "n2": "h2:1"}, SessionId("n1", "a"))
    asked: Any = Asked()
    holds.direct = asked
    task = asyncio.create_task(holds.run())
    try:
        await until(lambda: ("127.0.0.2", 1) in places)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert list(dict.fromkeys(places)) == [("127.0.0.1", 1), ("127.0.0.2", 1)]


async def test_g1_what_the_keeper_cannot_be_told_extends_nothing() -> None:
    """It would kill the node at the session's end for a section that the node lets run on."""
    session = Session(SessionId("n1", "a"), TIMING)

    class Full(asyncio.WriteTransport):
        def is_closing(self) -> bool:
            return True

    session._transport = Full()
    before = session.right_until("wiki")
    assert not session.extend("wiki", system.now() + 60)
    assert session.right_until("wiki") == before


async def test_g1_answer_to_an_earlier_life_is_none_to_the_one_that_takes_its_session_up() -> None:
    """Somebody may repeat it: its number was never used in this life."""
    session = SessionId("n1", "a")
    answers: list[Answer] = []
    for life in range(2):
        holds = Holds(TIMING, "n1", lambda app: True)
        claim, sent = leading(holds, {"n1": "h1:1", "n2": "127.0.0.1:1"}, session)
        await asking(holds, sent, 5)
        if life == 0:
            answers = [Answer("test", "n2", "n1", "wiki", session, ask.number) for _, ask in sent.asks]
        else:
            assert not {answer.number for answer in answers} & {ask.number for _, ask in sent.asks}
            assert min(ask.number for _, ask in sent.asks) > max(answer.number for answer in answers)
        assert claim.missing(system.now()) == ["n2"]


async def test_node_that_does_not_hold_is_not_asked_and_nothing_is_held_meanwhile() -> None:
    """It can take over whatever it would promise, so it never did; status says why."""
    holds = Holds(TIMING, "n1", lambda app: True)
    claim, sent = leading(holds, {"n1": "h1:1", "n2": "", "n3": "127.0.0.1:1"}, SessionId("n1", "a"))
    await asking(holds, sent, 3)
    now = system.now()
    claim.on_promise("n3", now, now, now + 1.0)
    assert {to for to, _ in sent.asks} == {"n3"}
    assert not holds.is_held("wiki", now)
    assert holds.missing("wiki")["n2"] == "it does not hold"


class Keeper:
    """Heeds what the node says of how long something may go on."""

    def __init__(self) -> None:
        self.wishes = Wishes()
        self._lines = wire.Lines()

    def write(self, data: bytes) -> None:
        """See asyncio.WriteTransport."""
        for line in self._lines.feed(data):
            match wire.decode_from_node(line):
                case wire.Extend(app, moment):
                    self.wishes.extend(app, moment)
                case _:
                    pass

    def get_write_buffer_size(self) -> int:
        """See asyncio.WriteTransport."""
        return 0

    def is_closing(self) -> bool:
        """See asyncio.WriteTransport."""
        return False


async def test_g1_neither_node_nor_keeper_believes_what_was_promised_to_an_earlier_reign() -> None:
    """Two reigns of an app in one session, within one lease; another app keeps what it has."""
    session, now = Session(SessionId("n1", "a"), TIMING), system.now()
    keeper: Any = Keeper()
    session._transport = keeper  # pyright: ignore[reportPrivateUsage]
    for app in ("wiki", "shop"):
        session.extend(app, now + 60)
    session.withdraw("wiki")
    assert (session.covers("wiki"), session.covers("shop")) == (False, True)
    assert session.right_until("wiki") < now
    wiki, shop = (Resource("unit", app, app, 1) for app in ("wiki", "shop"))
    assert keeper.wishes.extended_until([wiki]) < now
    assert keeper.wishes.extended_until([shop]) == now + 60
    session.extend("wiki", now + 5)
    assert keeper.wishes.extended_until([wiki]) == session.right_until("wiki") == now + 5
