"""What a handler gets besides the request."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from typing import Any

from phalanx import system

DEADLINE: contextvars.ContextVar[float] = contextvars.ContextVar(
    "phalanx_call_deadline", default=float("inf")
)
"""When whoever has called the handler that runs here stops waiting, by ``system.now()``: calls that it makes
itself do not wait longer."""


class CallContext:
    """What a handler gets as ``ctx``.

    ``active``: the ActiveContext of the section in which it runs, with ``kv``, ``db``, ``lock`` under its
    epoch; None on a node that is not active, for methods declared ``anywhere``. ``kv``: the app's KV, fenced
    if this node is active. ``caller``: what the caller calls itself. ``headers``: those of the request.
    """

    __slots__ = (
        "_deadline",
        "active",
        "app",
        "call_id",
        "caller",
        "epoch",
        "headers",
        "kv",
        "method",
        "node",
    )

    def __init__(
        self,
        app: str,
        node: str,
        method: str,
        *,
        call_id: str,
        caller: str,
        headers: Mapping[str, str],
        deadline: float,
        epoch: int,
        active: Any,
        kv: Any,
    ) -> None:
        self.app, self.node, self.method = app, node, method
        self.call_id, self.caller, self.headers = call_id, caller, headers
        self.epoch, self.active, self.kv = epoch, active, kv
        self._deadline = deadline

    @property
    def remaining_seconds(self) -> float:
        """How long the caller still waits. The handler is cancelled when that is over."""
        return max(0.0, self._deadline - system.now())
