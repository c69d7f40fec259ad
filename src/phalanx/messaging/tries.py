"""One call as its caller makes it, over all its tries."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Mapping
from typing import Protocol

from phalanx.decide.backoff import Backoff
from phalanx.errors import CallError
from phalanx.messaging.leading import Followed
from phalanx.ports import Message

RETRY = Backoff(first=0.01, longest=0.5)
"""Delays between tries at whoever is busy or not there; each is varied by half."""


class Ask(Protocol):
    """What :meth:`phalanx.ports.Bus.request` does, in whatever way."""

    def __call__(
        self, subject: str, data: bytes, *, headers: Mapping[str, str], timeout: float
    ) -> Awaitable[Message]: ...


class OutgoingTries:
    """One call, over all its tries."""

    __slots__ = (
        "app", "ask", "busy", "content_type", "data", "deadline", "followed", "headers", "id", "idempotent",
        "may_have_begun", "method", "tries", "why",
    )  # fmt: skip

    def __init__(
        self, app: str, method: str, data: bytes, content_type: str, deadline: float, idempotent: bool | None
    ) -> None:
        self.app, self.method, self.data, self.content_type = app, method, data, content_type
        self.deadline, self.idempotent = deadline, idempotent
        self.headers: dict[str, str] = {}
        self.ask: Ask | None = None
        """Makes the request; None: the bus does."""
        self.followed: Followed | None = None
        """Where it is heard that the last try will not be answered."""
        self.id = ""
        self.tries = 0
        self.may_have_begun = False
        """Whether an earlier try may have been carried out."""
        self.why = ""
        """Why the last try came to nothing."""
        self.busy: CallError | None = None
        """What the last one was answered, if that was "busy"."""

    def delay(self) -> float:
        """Before the next try."""
        self.tries += 1
        return RETRY.delay(self.tries) * random.uniform(0.5, 1.5)

    def failed(self, kind: type[CallError], code: str, message: str) -> CallError:
        """The error for the caller."""
        why = f"{message}{f': {self.why}' if self.why else ''}"
        return kind(code, why, app=self.app, method=self.method, started=self.may_have_begun)
