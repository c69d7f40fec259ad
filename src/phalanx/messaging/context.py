"""What a handler gets besides the request."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Mapping
from typing import Any

from phalanx import system


class CallContext:
    """What a handler gets as ``ctx``.

    ``active``: the ActiveContext of the section in which it runs, with ``kv``, ``db``, ``lock`` under its
    epoch (in a ring the PartitionContext); None on a node that is not active, for methods declared
    ``anywhere``. ``kv``: the app's KV, fenced if this node is active. ``caller``: what the caller calls
    itself. ``headers``: those of the request.
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
        "stream",
    )

    def __init__(
        self,
        app: str,
        node: str,
        method: str,
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
        self.stream: Any = None
        """Takes the items of a handler that yields; for :class:`Handler`."""

    @property
    def partition(self) -> int | None:
        """The partition that was called, in a ring; None elsewhere."""
        return getattr(self.active, "partition", None)

    @property
    def remaining_seconds(self) -> float:
        """How long the caller still waits. The handler is cancelled when that is over."""
        return max(0.0, self._deadline - system.now())


CURRENT: contextvars.ContextVar[CallContext | None] = contextvars.ContextVar("phalanx_call", default=None)
"""The call whose handler runs here, if one does."""


def current_call() -> CallContext:
    """The call whose handler runs here: what a handler gets as ``ctx``, also deep inside of what it calls.

    Raises LookupError outside of handlers.
    """
    context = CURRENT.get()
    if context is None:
        raise LookupError("no handler of a call runs here")
    return context


def callers_deadline() -> float:
    """When whoever has called the handler that runs here stops waiting, by ``system.now()``: calls that it
    makes itself do not wait longer. Infinite outside of handlers."""
    context = CURRENT.get()
    return context._deadline if context is not None else math.inf  # pyright: ignore[reportPrivateUsage]
