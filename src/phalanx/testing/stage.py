"""What the failover tests share: nodes of the test program on real NATS servers, and their history."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phalanx import system
from phalanx.testing.history import Event, History, violations
from phalanx.testing.nats import NatsCluster
from phalanx.testing.nodes import PROGRAM, Nodes


class Stage:
    """Nodes, their NATS servers, their history."""

    def __init__(self, nodes: Nodes, nats: NatsCluster, history: History, app: str) -> None:
        self.nodes, self.nats, self.history, self.app = nodes, nats, history, app

    async def settled(self, standbys: int | None = None) -> str:
        """Wait for an active node and all standbys; the active one."""
        active = await self.nodes.wait_for_active(self.app)
        await self.nodes.wait_for_standbys(self.app, len(self.nodes) - 1 if standbys is None else standbys)
        return active

    async def next_active(self, since: float, timeout: float = 20.0) -> Event:
        """The first section that begins after *since*."""

        def found() -> Event | None:
            return next(iter(self.history.events("active", since=since)), None)

        event: Event = await self.nodes.wait_until(found, timeout, "no section began")
        return event

    async def wait_for(self, kind: str, since: float, timeout: float = 20.0, **fields: Any) -> Event:
        """The first event of that kind after *since* whose fields are so."""

        def found() -> Event | None:
            return next(
                (
                    e
                    for e in self.history.events(kind, since=since)
                    if all(getattr(e, k) == v for k, v in fields.items())
                ),
                None,
            )

        event: Event = await self.nodes.wait_until(found, timeout, f"no event {kind} {fields}")
        return event

    def check(self) -> None:
        """No sections overlapped, and epochs grew (G1, G2)."""
        assert violations(self.history.events()) == []


@contextmanager
def stage(
    tmp_path: Path,
    nats: NatsCluster,
    *,
    count: int = 3,
    urls: Sequence[str] | None = None,
    urls_of: dict[int, Sequence[str]] | None = None,
    node_env: dict[str, str] | None = None,
    direct: Sequence[str] = (),
    **settings: Any,
) -> Generator[Stage]:
    """*count* nodes of the test program on *nats*, each next to one of its servers. *direct*: where each is
    reached without NATS."""
    history = History(tmp_path / "history")

    def env_of(i: int) -> dict[str, str]:
        own = [nats.url((i + j) % nats.size) for j in range(nats.size)] if urls is None else list(urls)
        if urls_of is not None and i in urls_of:
            own = list(urls_of[i])
        given = {
            "history": str(history.path),
            "urls": own,
            "server_name": nats.name(i % nats.size) if nats.size > 1 else "",
            **settings,
        }
        own_direct = {"PHALANX_DIRECT": direct[i]} if direct else {}
        return {"PHALANX_TEST": json.dumps(given), **own_direct, **(node_env or {})}

    try:
        with Nodes(PROGRAM, count=count, env_of=env_of) as nodes:
            yield Stage(nodes, nats, history, settings.get("apps", ("wiki",))[0])
    finally:
        history.close()


def since_now() -> float:
    """This moment on the clock of the history."""
    return system.now()
