"""One schedule: nodes whose tasks take and release, sessions that end, connections that break; then all is
calm."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import msgspec

from phalanx import system
from phalanx.coord import lock_key
from phalanx.coord.lock_body import Kind
from phalanx.coord.locks import Lock, Locks
from phalanx.decide import lock
from phalanx.decide.lock import LockState
from phalanx.errors import PhalanxError
from phalanx.testing.virtual_time import virtual_time

from .world import NAMES, Server, SimulatedBus, SimulatedRegister, SimulatedSession, Violation

FAULTY_SECONDS = 20.0
CALM_SECONDS = 40.0
NODES, TASKS = 3, 3


class Node:
    """A node with one session after the other."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.bus, self.register = SimulatedBus(world.server), SimulatedRegister()
        self.begin()

    def begin(self) -> None:
        """A new session, with what hangs on it."""
        self.session = SimulatedSession(self.name)
        bus: Any = self.bus
        self.locks = Locks(bus, NAMES, "wiki", self.session, self.register)

    async def work(self) -> None:
        """One task: take, hold for a while, release, as long as the schedule lasts."""
        world, rng = self.world, self.world.server.rng
        while not world.is_over:
            timeout = rng.choice((0, 0.5, 3.0, 60.0))
            session, work = self.session, asyncio.create_task(world.take(self.locks, timeout))
            work.add_done_callback(_looked_at)
            try:
                if world.server.chance(0.1):
                    await asyncio.sleep(rng.uniform(0, 0.5))
                    work.cancel()
                held = await work
            except (PhalanxError, asyncio.CancelledError):
                work.cancel()
                await asyncio.sleep(rng.uniform(0.01, 0.2))
                continue
            world.enter(session, held)
            await asyncio.sleep(rng.uniform(0, 0.6))
            world.leave(held)
            await held.release()

    async def live(self) -> None:
        """Its sessions end now and then: the keeper says so, or it runs out; and the connection breaks."""
        rng = self.world.server.rng
        while self.world.server.faults:
            await asyncio.sleep(rng.uniform(1, 8))
            if not self.world.server.faults:
                return
            if rng.random() < 0.5:
                self.bus.connect(up=False)
                await asyncio.sleep(rng.uniform(0.1, 2))
                self.bus.connect(up=True)
                continue
            await self._end_session(rng.uniform(0, 1.5))

    async def _end_session(self, seconds: float) -> None:
        """In *seconds* it is over for its own node; a little later for others, each in its time."""
        world, session, locks = self.world, self.session, self.locks
        world.server.count("sessions ended")
        over_at = system.now() + seconds
        session.ends_at(over_at)
        early = world.finds_over_early
        for node in world.nodes:
            seen = seconds * 0.2 if early else seconds + world.server.rng.uniform(0.05, 0.5)
            asyncio.get_running_loop().call_later(seen, node.register.tell, session.id)
        await asyncio.sleep(seconds + 0.01)
        self.begin()
        world.closing.append(asyncio.create_task(locks.close()))


def _looked_at(work: asyncio.Task[Lock]) -> None:
    """Its worker may have been ended meanwhile."""
    if not work.cancelled():
        work.exception()


class World:
    """All of it, and who holds what at this moment."""

    def __init__(self, seed: int, permits: int) -> None:
        self.server = Server(seed)
        self.permits, self.is_over, self.finds_over_early = permits, False, False
        self.holding: dict[int, tuple[SimulatedSession, Lock]] = {}
        self.closing: list[asyncio.Task[None]] = []
        self.nodes = [Node(self, f"n{number}") for number in range(NODES)]

    async def take(self, locks: Locks, timeout: float) -> Lock:
        """The lock, or a permit."""
        if self.permits == 1:
            return await locks.acquire("x", timeout=timeout)
        return await locks.take(Kind.SEMAPHORE, "x", self.permits, timeout)

    def enter(self, session: SimulatedSession, held: Lock) -> None:
        """Whoever was granted it and may still believe to have it counts."""
        if not held.is_held:
            return
        now = [(s, each) for s, each in self.holding.values() if s.is_valid and not each.is_released]
        if len(now) >= self.permits:
            raise Violation(
                f"{len(now) + 1} hold {self.permits}: {held.token} beside {[h.token for _, h in now]}"
            )
        self.server.count(f"{len(now) + 1} hold at once")
        self.holding[held.token] = session, held

    def leave(self, held: Lock) -> None:
        """It does not use it any more."""
        self.holding.pop(held.token, None)

    async def run(self) -> None:
        """Faults, then calm; everybody has to come to an end, and the lock to be free."""
        tasks = [asyncio.create_task(each.work()) for each in self.nodes for _ in range(TASKS)]
        tasks += [asyncio.create_task(each.live()) for each in self.nodes]
        try:
            await self._watched(tasks, FAULTY_SECONDS)
            self.server.faults = False
            for node in self.nodes:
                node.bus.connect(up=True)
            await self._watched(tasks, 6.0)
            self.is_over = True
            async with asyncio.timeout(CALM_SECONDS):
                await asyncio.gather(*tasks)
                held = await self.take(self.nodes[0].locks, CALM_SECONDS)
            await held.release()
        except TimeoutError:
            raise Violation("somebody waits for ever, or the lock is not free") from None
        finally:
            self.is_over = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for node in self.nodes:
                await node.locks.close()
            await asyncio.gather(*self.closing, return_exceptions=True)

    async def _watched(self, tasks: list[asyncio.Task[None]], seconds: float) -> None:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()


def run_one(seed: int, broken: str = "") -> tuple[str, dict[str, int]]:
    """The violation of that schedule (empty: none), and what happened in it."""
    random.seed(seed)
    with virtual_time(threads=False) as run, contextlib.ExitStack() as stack:
        world: World | None = None

        async def drive() -> None:
            nonlocal world
            world = World(seed, 1 + seed % 3)
            stack.enter_context(BREAKS[broken](world) if broken else contextlib.nullcontext())
            await world.run()

        try:
            run(drive())
        except Violation as violation:
            return str(violation), world.server.counts if world is not None else {}
    assert world is not None
    return "", world.server.counts


# --- rules that are broken on purpose


@contextmanager
def _no_compare_and_set(world: World) -> Generator[None]:
    world.server.ignores_expectations = True
    yield


@contextmanager
def _over_before_it_is(world: World) -> Generator[None]:
    world.finds_over_early = True
    yield


def _next_state(change: Callable[..., LockState]) -> Callable[[World], Any]:
    def broken(world: World) -> Any:
        return mock.patch.object(lock_key, "next_state", change)

    return broken


def _one_more(state: LockState, permits: int, *rest: Any) -> LockState:
    return msgspec.structs.replace(lock.next_state(state, permits + 1, *rest), permits=permits)


def _last_first(state: LockState, permits: int, *rest: Any) -> LockState:
    turned = msgspec.structs.replace(state, queue=state.queue[::-1])
    found = lock.next_state(turned, permits, *rest)
    return msgspec.structs.replace(found, queue=found.queue[::-1])


def _all_at_once(state: LockState, permits: int, *rest: Any) -> LockState:
    return lock.next_state(lock.next_state(state, permits, *rest), permits, *rest)


def _the_dead_stay(state: LockState, permits: int, is_mine: Any, claims: Any, is_over: Any) -> LockState:
    return lock.next_state(state, permits, is_mine, claims, lambda entry: False)


def _given_up_stays(state: LockState, permits: int, is_mine: Any, claims: Any, is_over: Any) -> LockState:
    return lock.next_state(state, permits, lambda entry: False, claims, is_over)


BREAKS: dict[str, Callable[[World], Any]] = {
    "writes without compare-and-set": _no_compare_and_set,
    "a session counts as over before it is": _over_before_it_is,
    "one permit too many": _next_state(_one_more),
    "the last of the queue is first": _next_state(_last_first),
    "several grants in one write": _next_state(_all_at_once),
    "the dead keep what they hold": _next_state(_the_dead_stay),
    "what was given up stays in the key": _next_state(_given_up_stays),
}
