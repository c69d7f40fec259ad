"""Planned hand-overs on the node that is active: judged first, so that they lose nothing; now or at a time.

One that is planned for later is a key in the platform's bucket (docs/storage.md). Whichever node is active
for the app at that time carries it out, by its own clock, so it outlives the terminal it was planned on, and
every node between.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import msgspec

from phalanx import system
from phalanx.aio import Background, wait_at_most
from phalanx.app import App, NodeApp
from phalanx.coord.membership import PlatformState
from phalanx.decide.switchover import Ends, Obstacle, obstacle
from phalanx.errors import BusError, ConfigError, PhalanxError, SwitchoverRefused
from phalanx.names import Names
from phalanx.observe.journal import Journal
from phalanx.ports import Bus
from phalanx.types import PlannedSwitchover, Role

log = logging.getLogger("phalanx.switchover")

CATCH_UP_SECONDS = 10.0
"""How long a hand-over waits for what passes: a replica that is behind, an activation under way."""

LATE_SECONDS = 60.0
"""A planned hand-over that nobody could begin so long after its time is given up, and that is told."""

_POLL_SECONDS = 0.1
_ANSWER_SECONDS = 2.0
_LOOK_SECONDS = 5.0
"""Wall clocks are set now and then: longer than this nobody sleeps over a planned moment."""


class DatabaseSays(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed here of ``data.status.DbStatus``, which only apps with a database load."""

    node: str = ""
    role: str = ""
    reason: str = ""
    lag_records: int = 0
    lag_seconds: float = 0.0


async def check_switchover(app: App, bus: Bus, names: Names, to: str | None) -> str:
    """Who would follow, *to* if given; returns once nothing speaks against it.

    Raises NotActive, ConfigError for a node that is no candidate, SwitchoverRefused for everything else.
    """
    deadline = system.now() + CATCH_UP_SECONDS
    while True:
        target = app.check_successor(to) or ""
        found = obstacle(await _look(app, bus, names, target))
        if found is None:
            return target
        if not found.passes or system.now() >= deadline:
            raise _refused(app.name, found)
        await asyncio.sleep(_POLL_SECONDS)


async def switch_over(app: App, bus: Bus, names: Names, reason: str, to: str | None = None) -> str | None:
    """Hand *app* over as :meth:`App.step_down` does, if nothing can be lost by it. Returns who was named.

    Raises what :func:`check_switchover` does, and Paused.
    """
    return await app.step_down(reason, await check_switchover(app, bus, names, to))


def _refused(app: str, found: Obstacle) -> SwitchoverRefused:
    return SwitchoverRefused(app, f"refused: {found.problem}", found.remedy.replace("APP", app))


async def _look(app: App, bus: Bus, names: Names, target: str) -> Ends:
    ends = Ends(node=app.node, target=target, is_active=app.role is Role.ACTIVE)
    if app.database is None or not target:
        return ends
    here = app.database.brief()
    there = await _ask(bus, names.database_subject(app.name, "status", target))
    return msgspec.structs.replace(
        ends,
        has_database=True,
        problem=here.problem,
        phase=here.phase,
        spool_bytes=here.spool_bytes,
        target_role=there.role,
        target_reason=there.reason,
        target_lag_seconds=there.lag_seconds,
        target_lag_records=there.lag_records,
    )


async def _ask(bus: Bus, subject: str) -> DatabaseSays:
    try:
        answer = await bus.request(subject, timeout=_ANSWER_SECONDS)
        return msgspec.json.decode(answer.data, type=DatabaseSays)
    except (BusError, msgspec.MsgspecError) as error:
        log.warning("asking %s: %s", subject, error)
        return DatabaseSays()


class Planned:
    """Carries out what is planned for the apps of this node, while it is active for them."""

    def __init__(
        self, bus: Bus, names: Names, state: PlatformState, apps: Mapping[str, NodeApp], journal: Journal
    ) -> None:
        self._bus, self._names, self._state = bus, names, state
        self._apps = {name: app for name, app in apps.items() if isinstance(app, App)}
        self._journal = journal
        self._taking: dict[str, tuple[PlannedSwitchover, int]] = {}
        """Of which it is not known yet whether this node has them."""
        self._changed = asyncio.Event()
        self._background = Background(log)
        state.on_switchovers(self._changed.set)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._changed.clear()
                await self._look()
                await wait_at_most(self._changed, self._next_look())
        finally:
            await self._background.close()

    def _next_look(self) -> float | None:
        moments = [planned.at for planned, _ in (*self._state.switchovers.values(), *self._taking.values())]
        if not moments:
            return None
        ahead = min(moments) - system.wall()
        # What is due and not taken belongs to another node, or to nobody yet: this one may become active.
        return min(_LOOK_SECONDS, ahead) if ahead > 0 else 1.0

    def _is_due(self, name: str, planned: PlannedSwitchover) -> bool:
        return name in self._apps and self._apps[name].is_active and planned.at <= system.wall()

    async def _look(self) -> None:
        due = {name: each for name, each in self._state.switchovers.items() if self._is_due(name, each[0])}
        for name, (planned, revision) in {**due, **self._taking}.items():
            self._taking[name] = planned, revision
            try:
                mine = await self._state.take_switchover(name, revision)
            except BusError as error:
                log.warning("app %s: taking up a planned switchover: %s", name, error)
                continue
            del self._taking[name]
            # Forgotten here at once, not only when the watch tells of it: it is carried out at most once.
            if self._state.switchovers.get(name, (planned, 0))[1] == revision:
                del self._state.switchovers[name]
            if mine:
                self._background.spawn(
                    self._carry_out(self._apps[name], planned), f"planned switchover of {name}"
                )

    async def _carry_out(self, app: App, planned: PlannedSwitchover) -> None:
        late = system.wall() - planned.at
        if late > LATE_SECONDS:
            problem = f"{late:.0f} s late: no node could begin it in time; it is given up"
            self._journal.app(
                app.name, "switchover-missed", reason=problem, level=logging.ERROR, by=planned.by
            )
            return
        why = f": {planned.reason}" if planned.reason else ""
        try:
            await switch_over(
                app, self._bus, self._names, f"planned switchover{why}, asked by {planned.by}", planned.to
            )
        except (ConfigError, PhalanxError) as error:
            self._journal.app(
                app.name, "switchover-refused", reason=str(error), level=logging.ERROR, by=planned.by
            )


__all__ = ["CATCH_UP_SECONDS", "LATE_SECONDS", "Planned", "check_switchover", "switch_over"]
