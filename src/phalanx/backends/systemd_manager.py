"""systemd's manager, over the system bus (org.freedesktop.systemd1(5)).

One connection, for one unit. It is made anew when it breaks: the bus may be restarted, and systemd itself
may (daemon-reexec). Whoever watches a unit is told that something may have changed, never what: signals can
be missed then, so the truth is always what is read.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

if TYPE_CHECKING:
    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

log = logging.getLogger("phalanx.backend")

CALL_SECONDS = 5.0
"""How long one call may take, reconnections included."""
RELOAD_SECONDS = 60.0

_RETRY_SECONDS = 0.05
_BUS = "org.freedesktop.DBus"
_SYSTEMD = "org.freedesktop.systemd1"
_MANAGER, _MANAGER_PATH = f"{_SYSTEMD}.Manager", "/org/freedesktop/systemd1"
_PROPERTIES = f"{_BUS}.Properties"
# What the bus says while systemd is not on it: for a moment, as it executes itself anew.
_ABSENT = frozenset(
    f"{_BUS}.Error.{name}"
    for name in ("NoReply", "Disconnected", "ServiceUnknown", "NameHasNoOwner", "Timeout", "NoServer")
)
_DISCONNECTED = f"{_BUS}.Error.Disconnected"
_DENIED = frozenset(
    f"{_BUS}.Error.{name}" for name in ("AccessDenied", "InteractiveAuthorizationRequired", "AuthFailed")
)


class ManagerError(Exception):
    """A call failed. ``name``: the D-Bus error's, empty if there was no answer in time."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        super().__init__(text)

    @property
    def is_unreachable(self) -> bool:
        """Whether systemd could not be asked at all."""
        return not self.name or self.name in _ABSENT

    @property
    def is_not_loaded(self) -> bool:
        """Whether systemd has no such unit in memory just now, which is so of many that do not run."""
        return self.name == f"{_SYSTEMD}.NoSuchUnit"

    @property
    def is_denied(self) -> bool:
        """Whether it was refused for lack of rights (polkit)."""
        return self.name in _DENIED


class Unit(msgspec.Struct, frozen=True, rename="pascal"):
    """A unit as systemd has it. Names and meanings are those of org.freedesktop.systemd1(5)."""

    id: str
    load_state: str
    load_error: tuple[str, str]
    active_state: str
    sub_state: str
    unit_file_state: str
    can_start: bool
    can_stop: bool
    need_daemon_reload: bool
    job: tuple[int, str]
    asserts: list[tuple[str, bool, bool, str, int]]
    inactive_exit_timestamp: int
    invocation_id: bytes = msgspec.field(name="InvocationID")

    @property
    def runs(self) -> bool:
        """Whether anything of it may run, as systemd sees it."""
        return self.active_state not in ("inactive", "failed")

    @property
    def invocation(self) -> str:
        """The id of its present or last start, empty before the first."""
        return self.invocation_id.hex() if any(self.invocation_id) else ""


class Service(msgspec.Struct, frozen=True, rename="pascal"):
    """What a unit has as a service."""

    type: str
    restart: str
    restart_force_exit_status: tuple[list[int], list[int]]
    remain_after_exit: bool
    slice: str
    control_group: str
    environment_files: list[tuple[str, bool]]
    result: str
    exec_main_code: int
    exec_main_status: int
    main_pid: int = msgspec.field(name="MainPID")


T = TypeVar("T", Unit, Service)


class Manager:
    """One connection to systemd. It is made anew when it breaks; :meth:`close` ends it for good."""

    def __init__(self) -> None:
        self._bus: MessageBus | None = None
        self._lost: asyncio.Future[None] | None = None
        self._was_connected = False
        self._connecting = asyncio.Lock()
        self._unit, self._rules = "", tuple[str, ...]()
        self._subscribed = self._closed = False
        self._on_change: Callable[[], None] = lambda: None
        self._on_job: Callable[[str, str], None] = lambda job, result: None

    # --- what it is asked

    async def load(self, unit: str) -> str:
        """The object path of *unit*; whether systemd could load it is for its state. Raises ManagerError."""
        (path,) = await self.call("LoadUnit", "s", [unit])
        return str(path)

    async def read(self, path: str) -> tuple[Unit, Service]:
        """The unit at *path*, which is a service. Raises ManagerError."""
        return await self._properties(path, "Unit", Unit), await self._properties(path, "Service", Service)

    async def unit(self, path: str) -> Unit:
        """The unit at *path*. Raises ManagerError."""
        return await self._properties(path, "Unit", Unit)

    async def root(self) -> str:
        """The control group that all units are below: empty on a host, another one in a container."""
        (group,) = await self.call("Get", "ss", [_MANAGER, "ControlGroup"], interface=_PROPERTIES)
        return str(group.value).rstrip("/")

    async def watch(
        self, unit: str, path: str, on_change: Callable[[], None], on_job: Callable[[str, str], None]
    ) -> None:
        """From now on call *on_change* when *unit* at *path* may have changed, and *on_job* with the path and
        the result of each job of it that is over. Raises ManagerError."""
        self._unit, self._on_change, self._on_job = unit, on_change, on_job
        signal = f"type='signal',sender='{_SYSTEMD}'"
        self._rules = (
            f"{signal},path='{path}',interface='{_PROPERTIES}',member='PropertiesChanged'",
            f"{signal},path='{_MANAGER_PATH}',interface='{_MANAGER}',member='JobRemoved',arg2='{unit}'",
            f"{signal},path='{_MANAGER_PATH}',interface='{_MANAGER}',member='Reloading'",
            f"type='signal',sender='{_BUS}',member='NameOwnerChanged',arg0='{_SYSTEMD}'",
        )
        self._subscribed = False
        await self.call("Ping", interface=f"{_BUS}.Peer")

    async def call(
        self,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        path: str = _MANAGER_PATH,
        interface: str = _MANAGER,
        timeout: float = CALL_SECONDS,
    ) -> list[Any]:
        """Call a method of systemd; again, if the connection breaks or systemd is away for a moment. So only
        what does no harm twice. *timeout* in seconds. Raises ManagerError."""
        last = "no answer"
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        bus = await self._connected()
                        return await _call(bus, _SYSTEMD, path, interface, member, signature, body)
                    except ManagerError as error:
                        last = error.text
                        if error.name not in _ABSENT or not self._was_connected:
                            raise
                    await asyncio.sleep(_RETRY_SECONDS)
        except TimeoutError:
            raise ManagerError("", f"no answer within {timeout:g} s: {last}") from None

    async def _properties(self, path: str, interface: str, kind: type[T]) -> T:
        from dbus_fast.unpack import unpack_variants

        body = await self.call("GetAll", "s", [f"{_SYSTEMD}.{interface}"], path=path, interface=_PROPERTIES)
        try:
            return msgspec.convert(unpack_variants(body)[0], kind)
        except msgspec.ValidationError as error:
            raise ManagerError("", f"this systemd describes units in another way: {error}") from error

    # --- the connection

    async def _connected(self) -> MessageBus:
        async with self._connecting:
            if self._closed:
                raise ManagerError(f"{_BUS}.Error.Failed", "nobody needs its answer any more")
            if self._bus is None:
                self._bus = await self._connect()
                self._subscribed = False
            bus = self._bus
            if self._rules and not self._subscribed:
                for rule in self._rules:
                    await _call(bus, _BUS, "/org/freedesktop/DBus", _BUS, "AddMatch", "s", [rule])
                await _call(bus, _SYSTEMD, _MANAGER_PATH, _MANAGER, "Subscribe", ignore="AlreadySubscribed")
                # Else systemd forgets a unit, and how it has ended, as soon as it does not run.
                await _call(bus, _SYSTEMD, _MANAGER_PATH, _MANAGER, "RefUnit", "s", [self._unit])
                self._subscribed = True
            return bus

    async def _connect(self) -> MessageBus:
        from dbus_fast import BusType
        from dbus_fast.aio import MessageBus

        bus = MessageBus(bus_type=BusType.SYSTEM)
        try:
            await bus.connect()
        except Exception as error:  # of a bus that ends meanwhile it may be anything
            raise ManagerError(_DISCONNECTED, _words(error)) from error
        bus.add_message_handler(self._on_message)
        self._was_connected = True
        self._lost = asyncio.ensure_future(bus.wait_for_disconnect())
        self._lost.add_done_callback(lambda lost: self._on_lost(bus, lost))
        return bus

    def _on_lost(self, bus: MessageBus, lost: asyncio.Future[None]) -> None:
        if lost.cancelled():
            return
        lost.exception()  # seen: whatever it was, the next call connects again
        if self._bus is bus:
            log.warning("the connection to the system bus broke")
            self._bus = None
            self._on_change()

    def _on_message(self, message: Message) -> None:
        match message.member:
            case "JobRemoved":
                _, job, _, result = message.body
                self._on_job(job, result)
                self._on_change()
            case "NameOwnerChanged":
                self._subscribed = False
                self._on_change()
            case "PropertiesChanged" | "Reloading":
                self._on_change()
            case _:
                pass

    async def close(self) -> None:
        """End the connection; nothing is watched any more. Twice is harmless."""
        self._closed = True
        self._on_change, self._on_job = lambda: None, lambda job, result: None
        bus, self._bus = self._bus, None
        if bus is not None and self._lost is not None:
            bus.disconnect()
            # The socket is closed by the reader, in a moment.
            await asyncio.wait({self._lost}, timeout=CALL_SECONDS)


async def _call(
    bus: MessageBus,
    destination: str,
    path: str,
    interface: str,
    member: str,
    signature: str = "",
    body: Sequence[Any] = (),
    *,
    ignore: str = "",
) -> list[Any]:
    from dbus_fast import Message, MessageType

    message = Message(destination, path, interface, member, signature=signature, body=list(body))
    try:
        reply = cast("Message | None", await bus.call(message))
    except (OSError, EOFError, AttributeError) as error:  # AttributeError: it was closed just now
        raise ManagerError(_DISCONNECTED, _words(error)) from error
    if reply is None:  # dbus-fast: the connection was ended by this side
        raise ManagerError(_DISCONNECTED, "disconnected")
    if reply.message_type is MessageType.ERROR:
        name = reply.error_name or ""
        if ignore and name.endswith(f".{ignore}"):
            return []
        raise ManagerError(name, str(reply.body[0]) if reply.body else name)
    return list(reply.body)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", "/run/dbus/system_bus_socket")
        return f"{error.strerror}: {address}"
    return f"{type(error).__name__}: {error}"
