"""What an operator does with apps, seen from outside of the nodes: ``PlatformClient.operator``.

::

    async with PlatformClient("prod", nats) as client:
        done = await client.operator.switchover("wiki", to="n2", reason="a new kernel for n1")
        print(done.active, done.epoch, done.seconds)

A switchover is judged and begun by the active node itself. A failover is for when that one is ill or does not
answer; also then nobody becomes active before its session is over (G1).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from phalanx import system
from phalanx.aio import wait_at_most
from phalanx.client_caller import caller
from phalanx.client_request import ask_active
from phalanx.control import FailoverRequest, StepDownReply, SwitchoverRequest
from phalanx.coord.election import nominate, read_leader
from phalanx.decide.election import choose_successor
from phalanx.decide.timing import OBSERVE_FACTOR, Timing
from phalanx.decide.why import Explanation, Facts, NodeFacts, explain
from phalanx.decide.why_pool import explain_pool
from phalanx.decide.why_ring import explain_ring
from phalanx.errors import (
    BusTimeout,
    BusUnavailable,
    ConfigError,
    StepDownFailed,
    SwitchoverRefused,
    WrongRevision,
)
from phalanx.observe.failovers import Failover, failovers
from phalanx.switchover import CATCH_UP_SECONDS
from phalanx.types import (
    AppStatus,
    Candidate,
    LeaderRecord,
    Nomination,
    PlannedSwitchover,
    Position,
    Role,
    SessionId,
)

if TYPE_CHECKING:
    from phalanx.client import PlatformClient
    from phalanx.client_views import NodeView

ENTRIES_LOOKED_AT = 5_000
FAILURES_LOOKED_AT = 500
"""So many of the newest audit entries are read at first."""

AT_ONCE_SECONDS = 5.0
"""How long a node that is told to end at once may take before only the end of its session is waited for."""

_POLL_SECONDS = 0.25


class Switched(msgspec.Struct, frozen=True, kw_only=True):
    """An app that went from ``previous`` (None: nobody led) to ``active``.

    ``seconds``: from the request until that one was active; ``healthy_seconds``: until its first healthy
    answer. ``left_behind``: what of the database did not go into the log, empty: nothing. ``ended``: how the
    previous section did: ``gracefully``, ``at once``, ``with its session``, ``before``.
    """

    app: str
    previous: str | None
    active: str
    epoch: int
    seconds: float
    healthy_seconds: float
    ended: str
    left_behind: str = ""


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """What of an app's database a failover would lose: what is committed on ``node`` and not in the log.

    ``known``: that node says how much; else only how long ago it has last put something into the log
    (``silent_seconds``, None: never). ``position``: the end of the log, which the next one starts with;
    ``target_position``: how far that one is, and ``target_lag_records`` behind; it applies the rest first.
    """

    node: str
    known: bool
    transactions: int = 0
    size_bytes: int = 0
    silent_seconds: float | None = None
    position: Position = Position()
    target_position: Position | None = None
    target_lag_records: int = 0


class FailoverPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a forced failover would do. ``leader``: who leads under ``epoch`` (None: nobody).

    ``answers``: it answers, so it can be told to end at once; ``is_live``: its session is not over.
    ``to``: whom the operator has named, ``target``: who would most likely follow. ``loss``: None for an app
    without a database. ``longest_seconds``: about how long the end of a session that nobody renews takes.
    """

    app: str
    leader: str | None
    epoch: int
    answers: bool
    is_live: bool
    to: str | None
    target: str | None
    loss: Loss | None
    longest_seconds: float


class OperatorClient:
    """Every call raises BusError and its kinds, and ConfigError for an app or a node that there is not."""

    def __init__(self, client: PlatformClient) -> None:
        self._client = client

    # --- switchover

    async def switchover(
        self, app: str, to: str | None = None, *, reason: str = "", timeout: float = 60.0
    ) -> Switched:
        """Hand *app* over, to node *to* if given, if nothing can be lost by it; wait until that one is
        active and has given a healthy answer.

        Raises ConfigError for a node that is no candidate; SwitchoverRefused, Paused: nothing was changed;
        StepDownFailed when nobody, or another one, took over within *timeout* seconds.
        """
        deadline, began = system.now() + timeout, system.now()
        await self._check_node(app, to)
        await self._client.check_not_paused(app)
        previous, epoch = await self._active(app)
        request = SwitchoverRequest(to, reason, caller())
        reply = await self._ask(app, "switchover", request, to, timeout)
        done = await self._followed(app, previous, epoch, reply, "gracefully", began, deadline)
        return _as_wanted(done, to)

    async def check_switchover(self, app: str, to: str | None = None) -> str:
        """Who would follow if *app* were handed over now; raises what :meth:`switchover` would."""
        await self._check_node(app, to)
        await self._active(app)
        request = SwitchoverRequest(to, "", caller(), check_only=True)
        timeout = CATCH_UP_SECONDS + AT_ONCE_SECONDS
        reply = await self._ask(app, "switchover", request, to, timeout)
        return reply.successor or ""

    async def plan_switchover(
        self, app: str, at: float, to: str | None = None, *, reason: str = ""
    ) -> PlannedSwitchover:
        """Have whichever node is active at *at* (Unix seconds) hand over then, if nothing can be lost by it.

        Raises ConfigError for a time in the past, for a node without that app, and if one is planned already.
        """
        await self._check_node(app, to)
        if at <= system.wall():
            raise ConfigError("at", at, "is in the past", "choose a later time, or leave it out for now")
        planned = PlannedSwitchover(app, at, to, reason, caller(), system.wall())
        names, bus = self._client.names, self._client.bus
        subject = names.key_subject(names.platform_bucket, names.switchover_key(app))
        there = await bus.read(names.bucket_stream(names.platform_bucket), subject)
        taken = ConfigError("app", app, "a switchover is planned already", "call it off first: --cancel")
        if there is not None and not there.removed:
            raise taken
        try:
            data = msgspec.json.encode(planned)
            await bus.write(subject, data, expect=there.revision if there is not None else 0)
        except WrongRevision:
            raise taken from None
        return planned

    async def cancel_switchover(self, app: str) -> PlannedSwitchover | None:
        """Call off what is planned for *app*; None if nothing is (any more)."""
        await self._client.check_app(app)
        names, bus = self._client.names, self._client.bus
        subject = names.key_subject(names.platform_bucket, names.switchover_key(app))
        there = await bus.read(names.bucket_stream(names.platform_bucket), subject)
        if there is None or there.removed:
            return None
        try:
            await bus.write(subject, expect=there.revision, headers={"KV-Operation": "DEL"})
        except WrongRevision:
            return None
        return msgspec.json.decode(there.data, type=PlannedSwitchover)

    # --- failover

    async def failover_plan(self, app: str, to: str | None = None) -> FailoverPlan:
        """What :meth:`failover` would do now. Raises ConfigError for a node that could not take over, Paused,
        and StepDownFailed when there is nobody who could."""
        await self._check_node(app, to)
        await self._client.check_not_paused(app)
        leader = await read_leader(self._client.bus, self._client.names, app)
        views = await self._client.nodes()
        node = leader.session.node if leader.session is not None else None
        there = next((view for view in views if view.node == node), None)
        is_live = there is not None and there.is_live and _is_its_session(there, leader)
        target = _target(app, views, leader, to)
        ttl = max((status.standing.ttl_seconds for _, status in _of(app, views)), default=Timing().ttl)
        return FailoverPlan(
            app=app,
            leader=node,
            epoch=leader.revision,
            answers=is_live and there is not None and there.answers,
            is_live=is_live,
            to=to,
            target=target,
            loss=await self._loss(app, node, target),
            longest_seconds=_longest(ttl),
        )

    async def failover(self, plan: FailoverPlan, *, reason: str = "", timeout: float = 60.0) -> Switched:
        """Have another node lead, whether the present one plays along or not.

        If it answers it is told to end at once, without grace. If not, the end of its session is waited for,
        after which nothing of it runs. Raises StepDownFailed when that takes longer than *timeout* seconds,
        or when somebody else leads meanwhile.
        """
        deadline, began = system.now() + timeout, system.now()
        bus, names = self._client.bus, self._client.names
        if plan.to is not None:
            await nominate(bus, names, plan.app, Nomination(plan.epoch, plan.to, caller()))
        ended, reply = "before", StepDownReply(plan.leader or "")
        if plan.is_live:
            ended = "with its session"
        if plan.answers:
            request = FailoverRequest(plan.epoch, plan.to, reason, caller())
            try:
                answer = await self._ask(plan.app, "failover", request, plan.to, AT_ONCE_SECONDS)
            except SwitchoverRefused:
                raise
            except StepDownFailed as error:
                if not isinstance(error.__cause__, BusTimeout | BusUnavailable):
                    raise  # it has answered
            else:
                ended, reply = "at once", answer
        done = await self._followed(plan.app, plan.leader, plan.epoch, reply, ended, began, deadline)
        return _as_wanted(done, plan.to)

    async def _loss(self, app: str, leader: str | None, target: str | None) -> Loss | None:
        if leader is None or app not in await self._client.databases_made():
            return None
        bus, names = self._client.bus, self._client.names
        said = {node.node: node for node in (await self._client.databases.status(app)).nodes}
        last = await bus.read(names.wal_stream(app), names.wal_record_subject(app))
        silent = max(0.0, system.wall() - last.time) if last is not None and last.time else None
        there, here = said.get(leader), said.get(target or "")
        end = max((node.position for node in said.values()), default=Position())
        loss = Loss(
            node=leader,
            known=False,
            silent_seconds=silent,
            position=end,
            target_position=here.position if here is not None else None,
            target_lag_records=here.lag_records if here is not None else 0,
        )
        if there is None or there.role != "live":
            return loss
        return msgspec.structs.replace(
            loss,
            known=True,
            transactions=max(0, there.captured_txid - there.shipped_txid),
            size_bytes=there.spool_bytes,
        )

    # --- explaining

    async def why(self, app: str) -> Explanation:
        """Why *app* is where it is, why not elsewhere, and what it waits for. Needs to read only."""
        await self._client.check_app(app)
        views, planned = await self._client.nodes(), await self._client.planned_switchovers()
        nodes = tuple(
            NodeFacts(
                view.node,
                view.is_live,
                next((status for _, status in _of(app, [view])), None),
            )
            for view in views
            if app in view.apps
        )
        if any(node.status is not None and node.status.pattern == "ring" for node in nodes):
            return explain_ring(Facts(app, system.wall(), nodes))
        if any(node.status is not None and node.status.pattern == "pool" for node in nodes):
            return explain_pool(Facts(app, system.wall(), nodes))
        led = any(node.status is not None and node.status.leader for node in nodes)
        failed = "" if led else await self._last_failure(app)
        return explain(Facts(app, system.wall(), nodes, planned.get(app), failed))

    async def _last_failure(self, app: str) -> str:
        entries = await self._client.audit(limit=FAILURES_LOOKED_AT)
        tried = [e for e in entries if e.app == app and e.action in ("activation-failed", "active")]
        if not tried or tried[-1].action == "active":
            return ""
        return f"on {tried[-1].node}: {tried[-1].reason}"

    async def failovers(self, app: str | None = None, *, limit: int = 20) -> list[Failover]:
        """The newest *limit* times that an app (*app*, if given) got a new leader, oldest first."""
        if app is not None:
            await self._client.check_app(app)
        for entries in (ENTRIES_LOOKED_AT, 100 * ENTRIES_LOOKED_AT):
            found = failovers(await self._client.audit(limit=entries), app)
            if len(found) >= limit:
                break
        return found[-limit:]

    async def failover_timeline(self, app: str, epoch: int) -> Failover:
        """How *app* got its leader of *epoch*. Raises ConfigError if the audit log does not have that."""
        for found in reversed(await self.failovers(app, limit=1_000_000)):
            if found.epoch == epoch:
                return found
        problem = "the audit log has no such failover"
        raise ConfigError("id", f"{app}/{epoch}", problem, "see: phalanx failover show")

    # --- common

    async def _check_node(self, app: str, to: str | None) -> None:
        await self._client.check_app(app)
        await self._client.check_elected(app)
        if to is None:
            return
        members = await self._client.members()
        able = sorted(node for node, member in members.items() if app in member.apps)
        if to not in able:
            remedy = f"choose one of {', '.join(able)}" if able else "no node has that app"
            raise ConfigError("node", to, f"no node of that name has app {app}", remedy)

    async def _active(self, app: str) -> tuple[str, int]:
        """Who is active, and its epoch. Raises SwitchoverRefused if nobody is who could hand over."""
        views = await self._client.nodes()
        found = [
            (status.epoch, view.node)
            for view, status in _of(app, views)
            if status.role in (Role.ACTIVE, Role.ACTIVATING)
        ]
        if found:
            epoch, node = max(found)
            return node, epoch
        leaders = {status.leader for _, status in _of(app, views) if status.leader}
        if leaders:
            leader = ", ".join(sorted(leaders))
            problem = f"refused: {leader} leads and does not answer, or is standing down"
            raise SwitchoverRefused(app, problem, f"see: phalanx why {app}; by force: phalanx failover {app}")
        raise SwitchoverRefused(app, "refused: no node is active for it", f"see: phalanx why {app}")

    async def _ask(
        self,
        app: str,
        action: str,
        request: SwitchoverRequest | FailoverRequest,
        to: str | None,
        timeout: float,
    ) -> StepDownReply:
        return await ask_active(self._client.bus, self._client.names, app, action, request, to, timeout)

    async def _followed(
        self,
        app: str,
        previous: str | None,
        epoch: int,
        reply: StepDownReply,
        ended: str,
        began: float,
        deadline: float,
    ) -> Switched:
        """Wait until somebody is active under a later epoch, and has given a healthy answer."""
        changed = asyncio.Event()
        subject = self._client.names.audit_subject("app", "*")
        subscription = await self._client.bus.subscribe(subject, lambda _: changed.set())
        active_after: float | None = None
        try:
            while True:
                changed.clear()
                views = await self._client.nodes(min(1.0, max(0.05, deadline - system.now())))
                next_one = _next_active(app, views, epoch)
                if next_one is not None:
                    active_after = system.now() - began if active_after is None else active_after
                    node, status = next_one
                    if status.standing.healthy_since:
                        return Switched(
                            app=app,
                            previous=previous,
                            active=node,
                            epoch=status.epoch,
                            seconds=active_after,
                            healthy_seconds=system.now() - began,
                            ended=ended,
                            left_behind=reply.left_behind,
                        )
                if system.now() >= deadline:
                    raise StepDownFailed(app, _late(previous, ended, next_one), f"see: phalanx why {app}")
                await wait_at_most(changed, min(_POLL_SECONDS, max(0.01, deadline - system.now())))
        finally:
            await subscription.unsubscribe()


def _as_wanted(done: Switched, to: str | None) -> Switched:
    if to is not None and done.active != to:
        problem = f"{done.active} took over (epoch {done.epoch}) instead of {to}"
        raise StepDownFailed(done.app, problem, f"see: phalanx why {done.app}")
    return done


def _late(previous: str | None, ended: str, found: tuple[str, AppStatus] | None) -> str:
    if found is not None:
        return f"{found[0]} is active, but has given no healthy answer in time"
    if previous is None:
        return "nobody has taken over in time"
    if ended == "with its session":
        return f"nobody has taken over in time, the session of {previous} may not be over yet"
    return f"{previous} has ended, but nobody has taken over in time"


def _next_active(app: str, views: Sequence[NodeView], epoch: int) -> tuple[str, AppStatus] | None:
    found = [
        (view.node, status)
        for view, status in _of(app, views)
        if status.role is Role.ACTIVE and status.epoch > epoch
    ]
    return max(found, key=lambda each: each[1].epoch, default=None)


def _of(app: str, views: Sequence[NodeView]) -> list[tuple[NodeView, AppStatus]]:
    """What each node that answers says of *app*."""
    return [
        (view, status)
        for view in views
        if view.status is not None
        for status in view.status.apps
        if status.name == app
    ]


def _is_its_session(view: NodeView, leader: LeaderRecord) -> bool:
    """Whether the node's present life is the one that leads: it may have died and come back."""
    if view.status is not None and view.status.session:
        return view.status.session == str(leader.session)
    return view.member is None or view.member.session == leader.session


def _target(app: str, views: Sequence[NodeView], leader: LeaderRecord, to: str | None) -> str | None:
    """Who would follow. Raises ConfigError for a node that could not, StepDownFailed if nobody could."""
    offers = [
        Candidate(
            SessionId(view.node, "x"),
            status.standing.eligible,
            status.standing.priority,
            status.reason,
            status.standing.no_failover,
        )
        for view, status in _of(app, views)
        if view.status is not None and view.status.session
        if leader.session is None or view.node != leader.session.node
    ]
    able = sorted(offer.session.node for offer in offers if offer.eligible)
    remedy = f"choose one of {', '.join(able)}" if able else "there is no other eligible node"
    if to is not None and to not in able:
        offer = next((offer for offer in offers if offer.session.node == to), None)
        if leader.session is not None and leader.session.node == to:
            problem = "leads already"
        else:
            problem = f"is no candidate now: {offer.reason or 'it says so'}" if offer else "does not answer"
        raise ConfigError("node", to, f"{problem} (app {app})", remedy)
    best = to or choose_successor(SessionId("-", "-"), offers, lambda session: False)
    if best is None:
        problem = "nobody could take over"
        if able:
            problem += f" by itself; {', '.join(able)} would have to be named"
        raise StepDownFailed(app, problem, f"see: phalanx why {app}" + ("; --to NODE" if able else ""))
    return best


def _longest(ttl: float) -> float:
    """About how long it takes until a session is over whose node does not answer.

    A host that is gone: the time in which observers hear nothing. A node that is cut off, but whose keeper
    is not, gives up after a TTL and has its grace; one that stands still is killed by its keeper.
    """
    timing = Timing.of(ttl)
    return max(OBSERVE_FACTOR * ttl, ttl + timing.grace + timing.fence_budget, 2 * timing.stall_limit) + 1.0


__all__ = ["FailoverPlan", "Loss", "OperatorClient", "Switched"]
