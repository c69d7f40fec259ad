"""What nodes say to each other without NATS: what is heard, and what is ignored."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec
import pytest
from tests.waiting import until

from phalanx import StartError
from phalanx.coord.direct import MAX_BYTES, Answer, Direct, DirectSecret, Question, resolve
from phalanx.decide.hold import Ask
from phalanx.types import SessionId

SECRET = DirectSecret.new()
ASK = Ask("wiki", 5, SessionId("n1", "a"), 1, 2.0)


class Heard:
    """Takes down what comes."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.questions: list[Question] = []
        self.answers: asyncio.Queue[Answer] = asyncio.Queue(100)

    def on_question(self, question: Question) -> str:
        """See Listener."""
        self.questions.append(question)
        return self.refusal

    def on_answer(self, answer: Answer) -> None:
        """See Listener."""
        self.answers.put_nowait(answer)


@asynccontextmanager
async def end(
    node: str, heard: Heard, *, platform: str = "test", secret: DirectSecret = SECRET
) -> AsyncGenerator[tuple[Direct, tuple[str, int]]]:
    """One end on loopback, and where it is."""
    direct = Direct(platform, node, secret, heard)
    place = await resolve(await direct.start("127.0.0.1", 0))
    assert place is not None
    try:
        yield direct, place
    finally:
        direct.stop()


@pytest.mark.parametrize("refusal", ["", "it is active here"])
async def test_question_is_answered(refusal: str) -> None:
    """By number, with the promise or the reason against it."""
    one, other = Heard(), Heard(refusal)
    async with end("n1", one) as (direct, _), end("n2", other) as (_, place):
        direct.ask(place, "n2", ASK)
        async with asyncio.timeout(20):
            answer = await one.answers.get()
        assert answer == Answer("test", "n2", "n1", "wiki", ASK.session, 1, refusal)
        assert [question.ask for question in other.questions] == [ASK]


@pytest.mark.parametrize(
    ("platform", "secret", "to"),
    [("test", DirectSecret.new(), "n2"), ("prod", SECRET, "n2"), ("test", SECRET, "n3")],
    ids=["another-secret", "another-platform", "for-another-node"],
)
async def test_what_is_not_for_this_node_is_ignored_and_counted(
    platform: str, secret: DirectSecret, to: str
) -> None:
    """Nobody promises anything by it; what comes after it is heard."""
    one, other = Heard(), Heard()
    async with (
        end("n1", Heard(), platform=platform, secret=secret) as (stranger, _),
        end("n1", one) as (direct, _),
        end("n2", other) as (listening, place),
    ):
        stranger.ask(place, to, ASK)
        direct.ask(place, "n2", ASK)
        async with asyncio.timeout(20):
            await one.answers.get()
        await until(lambda: listening.ignored >= 1)
        assert len(other.questions) == 1


async def test_junk_and_what_is_too_long_is_ignored_and_counted() -> None:
    """Also if it is signed."""
    one, other = Heard(), Heard()
    async with end("n1", one) as (direct, _), end("n2", other) as (listening, place):
        signed = msgspec.json.encode({"type": "ask", "platform": "test"})
        junk = [b"", b"x", b"y" * 65000, b"z" * (MAX_BYTES + 1), direct.sign(signed) + signed]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for data in junk:
                sender.sendto(data, place)
        await until(lambda: listening.ignored >= len(junk))
        direct.ask(place, "n2", ASK)
        async with asyncio.timeout(20):
            await one.answers.get()
        assert len(other.questions) == 1


async def test_port_that_is_taken_is_said_in_one_line() -> None:
    """With what to do."""
    async with end("n1", Heard()) as (_, place):
        with pytest.raises(StartError, match="direct: cannot listen on"):
            await Direct("test", "n2", SECRET, Heard()).start(*place)


async def test_name_that_is_not_known_is_nowhere() -> None:
    """It is asked for again later."""
    assert await resolve("nobody.invalid:7421") is None
