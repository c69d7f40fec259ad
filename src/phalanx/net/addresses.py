"""The virtual addresses of one app on this node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import ip_interface
from pathlib import Path

from phalanx import child, netlink
from phalanx.aio import wait_at_most
from phalanx.config import VirtualIP
from phalanx.errors import AddressError
from phalanx.net import asking, kernel
from phalanx.net.held import Held
from phalanx.net.placing import place
from phalanx.ports import AddressClaim, SectionContext
from phalanx.types import Resource

log = logging.getLogger("phalanx.net")

LOOK_SECONDS = 10.0
"""Between looks at the interfaces where the kernel says nothing of a change (some it does not tell)."""

_LINGER_SECONDS = 0.02
"""Changes come in bursts."""

_CAP_NET_ADMIN, _CAP_NET_RAW = 12, 13


class Addresses:
    """Implements ``ports.SectionAddresses``."""

    def __init__(self, app: str, declared: Sequence[VirtualIP], ttl_seconds: float) -> None:
        self._app, self._declared, self._ttl_seconds = app, tuple(declared), ttl_seconds
        self._held: list[Held] = []
        self._turn = asyncio.Lock()
        self._lost: asyncio.Future[AddressError] | None = None
        self._on_change: Callable[[], None] = lambda: None
        self._problem = "its addresses have not been looked at yet"
        self._places: dict[str, kernel.Link] = {}
        self._changes: kernel.Changes | None = None
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    # --- whether this node could have them

    async def check(self) -> None:
        """See ``ports.SectionAddresses.check``."""
        self._check_rights()
        network = await self._look()
        for declared in self._declared:
            place(self._app, declared, network)

    def _check_rights(self) -> None:
        has = _capabilities()
        missing = [
            name
            for name, bit in (("CAP_NET_ADMIN", _CAP_NET_ADMIN), ("CAP_NET_RAW", _CAP_NET_RAW))
            if not has & 1 << bit
        ]
        if missing:
            raise AddressError(
                self._app,
                self._declared[0].address,
                "prepare",
                f"this process lacks {' and '.join(missing)}",
                "run it as root, or with AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW (systemd)",
            )

    async def claims(self) -> tuple[AddressClaim, ...]:
        """See ``ports.SectionAddresses.claims``."""
        self._check_rights()
        network = await self._look()
        places = [
            (declared, place(self._app, declared, network))
            for declared in self._declared
            if not asking.is_here(declared, network)
        ]
        try:
            answers = await asyncio.gather(*(asking.who_has(*where) for where in places))
        except OSError as error:
            problem = f"no raw socket: {error.strerror}"
            raise AddressError(self._app, places[0][0].address, "prepare", problem) from error
        return tuple(
            AddressClaim(declared.address, link.name, macs)
            for (declared, link), macs in zip(places, answers, strict=True)
            if macs
        )

    async def start(self, on_change: Callable[[], None]) -> None:
        """See ``ports.SectionAddresses.start``."""
        self._on_change = on_change
        try:
            self._changes = kernel.Changes(self._on_kernel)
        except OSError as error:
            problem = f"netlink cannot be listened to: {error.strerror}"
            raise AddressError(self._app, self._declared[0].address, "prepare", problem) from error
        self._judge(await self._look())
        self._watching = asyncio.create_task(self._watch(), name=f"{self._app} interfaces")

    async def close(self) -> None:
        """See ``ports.SectionAddresses.close``."""
        if self._changes is not None:
            self._changes.close()
            self._changes = None
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None

    def ineligible_because(self) -> str:
        """See ``ports.SectionAddresses.ineligible_because``."""
        return self._problem

    def _on_kernel(self, change: kernel.Change) -> None:
        if change.prolonged and not self._problem:
            return  # by ourselves, and all the time
        for held in self._held:
            if change.interface in (0, held.index):
                held.look()
        ours = {link.index for link in self._places.values()}
        if self._problem or change.interface == 0 or change.interface in ours:
            self._changed.set()

    async def _watch(self) -> None:
        while True:
            if await wait_at_most(self._changed, LOOK_SECONDS):
                await asyncio.sleep(_LINGER_SECONDS)
            self._changed.clear()
            try:
                self._judge(await self._look())
            except AddressError as error:
                log.error("%s", error)

    async def _look(self) -> kernel.Network:
        try:
            return await child.finish(child.in_thread(kernel.look))
        except OSError as error:
            problem = f"the interfaces cannot be read: {error.strerror or error}"
            raise AddressError(self._app, self._declared[0].address, "prepare", problem) from error

    def _judge(self, network: kernel.Network) -> None:
        problem = ""
        for declared in self._declared:
            try:
                self._places[declared.address] = place(self._app, declared, network)
            except AddressError as error:
                problem = problem or f"address {declared.address}: {error.problem}"
        if problem != self._problem:
            self._problem = problem
            self._on_change()

    # --- having them

    async def acquire(self, section: SectionContext, left: Sequence[Resource] = ()) -> None:
        """See ``ports.SectionAddresses.acquire``."""
        async with self._turn:
            self._lost = asyncio.get_running_loop().create_future()
            try:
                await self._take_all(section, left)
            except BaseException:
                await child.finish(asyncio.create_task(self._drop_patiently(), name=f"{self._app} addresses"))
                raise

    async def _take_all(self, section: SectionContext, left: Sequence[Resource]) -> None:
        network = await self._look()
        earlier = {resource.details.get("address", ""): resource for resource in left}
        for address, resource in earlier.items():
            if address not in {declared.address for declared in self._declared}:
                await self._end_left_over(section, resource)
        for declared in self._declared:
            lifetime = float(declared.lifetime) if declared.lifetime is not None else self._ttl_seconds
            link = place(self._app, declared, network)
            self._held.append(Held(declared, lifetime, link, section, self._on_lost))
        # At the same time: most of it is waiting for nobody to answer.
        taking = [
            asyncio.create_task(
                self._take(held, section, earlier.get(declared.address)), name=f"{self._app} taking {held}"
            )
            for held, declared in zip(self._held, self._declared, strict=True)
        ]
        try:
            await asyncio.gather(*taking)
        except BaseException:
            for task in taking:
                task.cancel()
            await asyncio.gather(*taking, return_exceptions=True)
            raise

    async def _take(self, held: Held, section: SectionContext, earlier: Resource | None) -> None:
        if earlier is not None:
            if await held.take_up(earlier):
                return
            log.warning("app %s: %s is not here any more; it is taken anew", self._app, held)
            section.unregister(earlier.id)
            held.begin_anew()
        await held.take()

    async def _end_left_over(self, section: SectionContext, resource: Resource) -> None:
        """It is not declared any more. Raises AddressError."""
        address = ip_interface(resource.details["address"]).ip
        created = int(resource.details.get("created") or 0)
        try:
            await child.finish(child.in_thread(partial(netlink.withdraw, address, created=created)))
        except OSError as error:
            problem = error.strerror or str(error)
            raise AddressError(self._app, str(address), "release", problem) from error
        section.unregister(resource.id)

    async def leave(self) -> None:
        """See ``ports.SectionAddresses.leave``."""
        async with self._turn:
            for held in self._held:
                await held.leave()
            self._held.clear()

    @property
    def lost(self) -> asyncio.Future[AddressError]:
        """See ``ports.SectionAddresses.lost``."""
        if self._lost is None:
            self._lost = asyncio.get_running_loop().create_future()
        return asyncio.shield(self._lost)

    def _on_lost(self, error: AddressError) -> None:
        if self._lost is not None and not self._lost.done():
            log.error("%s", error, extra={"app": self._app})
            self._lost.set_result(error)

    async def release(self) -> None:
        """See ``ports.SectionAddresses.release``."""
        async with self._turn:
            await child.finish(asyncio.create_task(self._drop_all(), name=f"{self._app} addresses"))

    async def _drop_all(self) -> None:
        """Those that cannot be dropped stay, for the next try. Raises AddressError."""
        held = list(self._held)
        results = await asyncio.gather(*(one.drop() for one in held), return_exceptions=True)
        failed = [
            (one, error) for one, error in zip(held, results, strict=True) if isinstance(error, BaseException)
        ]
        self._held = [one for one, _ in failed]
        for _, error in failed:
            raise error

    async def _drop_patiently(self) -> None:
        """After a failed start: until none is left, as the section takes it for one that left nothing."""
        while True:
            try:
                await self._drop_all()
                return
            except AddressError as error:
                log.critical("%s; trying on", error, extra={"app": self._app})
            await asyncio.sleep(0.5)


def _capabilities() -> int:
    """Those in effect, capabilities(7), one bit each; all where that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return -1
