"""A node with a pool whose instances write down what they do: ``python -m tests.e2e.pool_node``.

``POOL_HISTORY``: the file. ``POOL_REPLICAS``: a number, or ``all``. ``POOL_ILL``: a file; the node whose name
it holds is ill. ``POOL_BACKEND``: the command of a backend.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from phalanx import ActiveContext, CallContext, FunctionCheck, Platform, Pool, Process
from phalanx.testing.history import History

APP = "workers"


def build() -> Platform:
    """The platform with its pool."""
    history = History(os.environ["POOL_HISTORY"])
    replicas = os.environ["POOL_REPLICAS"]
    ill_file = Path(os.environ["POOL_ILL"])
    command = os.environ.get("POOL_BACKEND", "")
    platform = Platform("test", timings={"ttl": 2.0})
    node = platform.config.node

    def is_well() -> bool:
        return not ill_file.exists() or ill_file.read_text() != node

    workers = platform.app(
        APP,
        Pool(replicas=None if replicas == "all" else int(replicas)),
        backend=Process(command) if command else None,
        checks=[FunctionCheck(is_well, name="well", interval="50ms", failures=2)],
    )

    @workers.on_active
    async def work(ctx: ActiveContext) -> None:  # pyright: ignore[reportUnusedFunction]
        history.record("active", ctx.node, APP, ctx.epoch)
        ctx.ready()
        try:
            while True:
                await asyncio.sleep(0.005)
                history.record("tick", ctx.node, APP, ctx.epoch)
        finally:
            history.record("passive", ctx.node, APP, ctx.epoch)

    @workers.handle("who")
    async def who(ctx: CallContext) -> str:  # pyright: ignore[reportUnusedFunction]
        history.record("call", ctx.node, APP, ctx.epoch)
        return ctx.node

    return platform


if __name__ == "__main__":
    build().run()
