"""Fences the hosts of sessions that did not end themselves, by the declared command, before a takeover.

A session that its own keeper or node has ended needs no fencing: all that hung on it was gone before. One
that others found silent may go on somewhere, cut off or frozen; then the new leader's section starts nothing
before the command has said that the host runs nothing any more, or an operator has
(``phalanx fence NODE --confirm-off``). Either is noted in the platform's bucket, so that it is done once for
each session and not for each app.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from dataclasses import dataclass, field

import msgspec

from phalanx import system
from phalanx.config import Fence
from phalanx.coord.membership import PlatformState
from phalanx.decide.fencing import needless
from phalanx.errors import BusError, FenceFailed
from phalanx.names import Names
from phalanx.observe.journal import Journal
from phalanx.ports import Bus
from phalanx.probes import CheckFailed, run_program
from phalanx.types import FenceNote, Member, Resource, SessionId

log = logging.getLogger("phalanx.fence")

NO_COMMAND = "it asks for that, but this node declares no fence command"

_encode = msgspec.json.Encoder().encode


def is_for_each_app(fence: Fence) -> bool:
    """Whether its command names the app, so that it has to run for each."""
    return any("{app}" in argument for argument in fence.command)


def command_for(fence: Fence, node: str, host: str, app: str) -> tuple[str, ...]:
    """The command with its placeholders filled in. Braces that are no placeholder stay as they are."""
    filled: list[str] = []
    for argument in fence.command:
        for name, value in (("{node}", node), ("{host}", host), ("{app}", app)):
            argument = argument.replace(name, value)
        filled.append(argument)
    return tuple(filled)


async def run_fence_command(fence: Fence, node: str, host: str, app: str, *, marker: str = "") -> str:
    """Run the command until it succeeds once; what it said last. Its output goes into the log.

    *marker*: the id under which the keeper knows it, empty if there is none.

    Each run is killed, with all that it has started, after ``fence.timeout``, and when this is cancelled.
    Raises FenceFailed after ``fence.retries`` further runs.
    """
    command, last = command_for(fence, node, host, app), ""
    for attempt in range(fence.retries + 1):
        if attempt:
            await asyncio.sleep(float(fence.delay))
        try:
            async with asyncio.timeout(float(fence.timeout)):
                return await run_program(
                    command, lambda line: log.info("fencing node %s: %s", node, line), marker=marker
                )
        except TimeoutError:
            last = f"the command did not end within {fence.timeout:g} s"
        except CheckFailed as error:
            last = f"the command {error.detail}"
        log.error("fencing node %s, run %d of %d: %s", node, attempt + 1, fence.retries + 1, last)
    raise FenceFailed(app, node, last)


@dataclass(slots=True)
class _Turn:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted_by: int = 0


class Fencer:
    """One node's fencing of others.

    *config*: None where no command is declared; then nothing is taken over from a node that does declare one,
    unless that needs no fencing or is known to be off.
    """

    def __init__(
        self,
        config: Fence | None,
        bus: Bus,
        names: Names,
        node: str,
        state: PlatformState,
        journal: Journal,
        register: Callable[[Resource], Awaitable[None]],
        unregister: Callable[[str], None],
    ) -> None:
        self._register, self._unregister = register, unregister
        self._config, self._bus, self._names, self._node = config, bus, names, node
        self._state, self._journal = state, journal
        self._turns: dict[SessionId, _Turn] = {}

    @property
    def has_command(self) -> bool:
        """Whether this node can fence others, and wants to be fenced by them."""
        return self._config is not None

    @property
    def sessions(self) -> int:
        """How many sessions are being fenced, or waited for, at present."""
        return len(self._turns)

    async def fence(self, app: str, epoch: int, sessions: tuple[SessionId, ...]) -> None:
        """Return once nothing of *sessions*, of which *app* is taken over, can run any more.

        Raises FenceFailed, BusError.
        """
        for session in sessions:
            # Of several apps that are taken over from it only one runs the command.
            async with self._turn(session):
                await self._fence_one(app, epoch, session)

    @contextlib.asynccontextmanager
    async def _turn(self, session: SessionId) -> AsyncGenerator[None]:
        """One at a time for each session. Nothing is kept of sessions that nobody waits for."""
        turn = self._turns.setdefault(session, _Turn())
        turn.wanted_by += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.wanted_by -= 1
            if not turn.wanted_by:
                del self._turns[session]

    async def _fence_one(self, app: str, epoch: int, session: SessionId) -> None:
        # From the stream's leader: what the watch has may be of before this session, and prove nothing. One
        # is in the member key before it can lead, so that another one there is a later one.
        found = await self._state.read(self._names.member_key(session.node), Member)
        member = found[0] if found is not None else None
        if why := await self._needless(app, session, member):
            log.info("app %s: session %s needs no fencing: %s", app, session, why)
            return
        host = member.host if member is not None and member.host else session.node
        began = system.now()
        reason = f"node {session.node} on host {host} did not end its session itself"
        self._tell(app, epoch, session, "fencing", reason)
        try:
            if self._config is None:
                raise FenceFailed(app, session.node, NO_COMMAND)
            how = await self._known_to_keeper(self._config, app, epoch, session, host)
        except FenceFailed as error:
            self._tell(app, epoch, session, "fence-failed", str(error), system.now() - began)
            raise
        reason = f"node {session.node}: {how}"
        self._tell(app, epoch, session, "fence-done", reason, system.now() - began)

    def _tell(
        self, app: str, epoch: int, session: SessionId, action: str, reason: str, seconds: float | None = None
    ) -> None:
        self._journal.app(
            app,
            action,
            epoch=epoch,
            reason=reason,
            duration_seconds=seconds,
            level=logging.ERROR if action == "fence-failed" else logging.WARNING,
            fenced_node=session.node,
            session=str(session),
        )

    async def _needless(self, app: str, session: SessionId, member: Member | None) -> str:
        """Why *session* needs no fencing; empty if it does. *member*: its node's, as it is now."""
        keys = (self._names.fenced_key(session.node), self._names.fenced_key(session.node, app))
        found = [await self._state.read(key, FenceNote) for key in keys]
        notes = [each[0] if each is not None else None for each in found]
        return needless(session, self._node, member.session if member is not None else None, notes)

    async def _known_to_keeper(
        self, fence: Fence, app: str, epoch: int, session: SessionId, host: str
    ) -> str:
        """It must not outlive this node: it could shoot a host that leads again by then."""
        marker = f"fence.{session.node}.{secrets.token_hex(8)}"
        await self._register(Resource("process", marker, app, epoch))
        try:
            return await self._command_or_word(fence, app, session, host, marker)
        finally:
            self._unregister(marker)

    async def _command_or_word(
        self, fence: Fence, app: str, session: SessionId, host: str, marker: str
    ) -> str:
        """Run the command; but an operator's word ends it. How it is known then."""
        command = run_fence_command(fence, session.node, host, app, marker=marker)
        running = asyncio.create_task(command)
        confirmed = asyncio.create_task(self._confirmed(session))
        try:
            await asyncio.wait({running, confirmed}, return_when=asyncio.FIRST_COMPLETED)
            if confirmed.done():
                return f"off, by {confirmed.result().by}"
            said = running.result()
        finally:
            for task in (running, confirmed):
                task.cancel()
            await asyncio.gather(running, confirmed, return_exceptions=True)
        await self._note(app if is_for_each_app(fence) else "", session, said)
        return f"the command said: {said}"

    async def _confirmed(self, session: SessionId) -> FenceNote:
        changed = asyncio.Event()
        with self._told(changed.set):
            while True:
                changed.clear()
                note = self._state.fenced.get(session.node)
                if note is not None and note.session == session:
                    return note
                await changed.wait()

    @contextlib.contextmanager
    def _told(self, callback: Callable[[], None]) -> Generator[None]:
        self._state.on_fenced(callback)
        try:
            yield
        finally:
            self._state.off_fenced(callback)

    async def _note(self, own: str, session: SessionId, said: str) -> None:
        """So that the next app, or the next leader of this one, does not do it again. Best effort.

        *own*: the app for which alone it was done; empty: for all.
        """
        note = FenceNote(session, f"the fence command of {self._node}", system.wall(), said, own)
        subject = self._names.key_subject(
            self._names.platform_bucket, self._names.fenced_key(session.node, own)
        )
        try:
            await self._bus.write(subject, _encode(note), timeout=1.0)
        except BusError as error:
            log.warning("node %s may be fenced again, as this is not noted: %s", session.node, error)


__all__ = ["Fencer", "command_for", "is_for_each_app", "run_fence_command"]
