"""One virtual address in one active section: taken, announced, verified, given back.

The invariant: from before it is put on the interface until it was seen to be gone, the keeper knows it; and
it is there with a lifetime, which is prolonged only while the node's session is valid. So it goes with the
section, or by the keeper, or, if both are dead or frozen, by the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from phalanx import child, netlink, system
from phalanx.aio import wait_at_most
from phalanx.config import VirtualIP
from phalanx.errors import AddressError
from phalanx.net import kernel, packets
from phalanx.net.segment import Segment
from phalanx.ports import SectionContext
from phalanx.types import Resource

log = logging.getLogger("phalanx.net")

T = TypeVar("T")

CARRIER_PATIENCE_SECONDS = 1.0
"""An interface without carrier for longer than this has lost its addresses to the neighbours."""

DEFEND_SECONDS = 10.0
"""RFC 5227, 2.4 b: a second claim by another host within this is not contested any more."""

EXPIRY_SLACK_SECONDS = 1.5
"""The kernel removes an address up to a second after its lifetime."""

_ASK_AGAIN_SECONDS = 0.1


class _Confirmed(NamedTuple):
    """What a look found: the interface, and the address on it; None for what is gone."""

    link: kernel.Link | None
    present: netlink.Present | None


class Held:
    """One address. *on_lost* is told once why it is not ours any more."""

    def __init__(
        self,
        declared: VirtualIP,
        lifetime_seconds: float,
        link: kernel.Link,
        section: SectionContext,
        on_lost: Callable[[AddressError], None],
    ) -> None:
        self._declared, self._link, self._section, self._on_lost = declared, link, section, on_lost
        self._address = ipaddress.ip_interface(declared.address)
        self._most = math.ceil(lifetime_seconds)
        owner = f"{section.platform}/{section.node}/{section.app}"
        self._label = kernel.label_of(link.name, owner) if self._address.version == 4 else ""
        details = {
            "address": declared.address,
            "interface": link.name,
            "label": self._label,
            "lifetime": str(self._most),
            **({"fixed": "yes"} if declared.lifetime is not None else {}),
        }
        resource_id = f"{section.app}.{section.epoch}.vip.{self._address.ip}.{secrets.token_hex(4)}"
        self._resource = self._own_resource = Resource(
            "vip", resource_id, section.app, section.epoch, details=details
        )
        self._created = 0
        self._segment: Segment | None = None
        self._claim: packets.Claim | None = None
        self._claimed = asyncio.Event()
        self._contested_at = float("-inf")
        self._holds = False
        self._look = asyncio.Event()
        self._no_carrier_since: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._announcing: asyncio.Task[None] | None = None

    @property
    def index(self) -> int:
        """The interface's."""
        return self._link.index

    def __str__(self) -> str:
        return f"{self._declared.address} on {self._link.name}"

    # --- taking it

    async def take(self) -> None:
        """Register, clean up, probe, put it there, announce. Raises AddressError, SessionLost.

        On a failure the caller has to :meth:`drop` it.
        """
        await self._section.register(self._resource)
        await self._in_thread("acquire", self._clean)
        if self._link.mac:
            self._open_segment()
            await self._probe()
        self._created = await self._in_thread("acquire", self._put)
        # From now on a keeper that acts late cannot take a newer section's for this one.
        details = {**self._resource.details, "created": str(self._created)}
        self._resource = msgspec.structs.replace(self._resource, details=details, adoptable=True)
        await self._begin("has taken")

    async def take_up(self, resource: Resource) -> bool:
        """Go on with *resource*, which an earlier life of the node has put there; nobody is asked for it: we
        have it. False if it is not here any more. Raises AddressError, SessionLost.
        """
        created = int(resource.details.get("created") or 0)
        self._resource, self._created = resource, created
        if not created or not await self._in_thread("acquire", self._prolong_what_is_here):
            return False
        if self._link.mac:
            self._open_segment()
        await self._begin("has adopted")
        return True

    async def _begin(self, how: str) -> None:
        """It is here: the network and the keeper are told, and it is kept from now on."""
        self._holds = True
        self._announce()
        await self._section.register(self._resource)
        self._own(self._keep(), f"{self._section.app} keeping {self._declared.address}")
        log.info("app %s: %s %s", self._section.app, how, self, extra={"app": self._section.app})

    def begin_anew(self) -> None:
        """What an earlier life has left is not here: :meth:`take` takes it as if there had been none."""
        self._resource, self._created = self._own_resource, 0

    def _prolong_what_is_here(self) -> bool:
        found = self._find()
        if found is None or found.created != self._created:
            return False
        if not (lifetime := self._lifetime()):
            raise OSError(errno.ETIME, "the session is over")
        kernel.put(self._link.index, self._address, lifetime, self._label)
        return True

    def _clean(self) -> None:
        """Remove what a crashed run has left: this address anywhere, if it is one of ours. Blocks."""
        for present in netlink.find(self._address.ip):
            if kernel.is_ours(present):
                netlink.remove(present)
                log.warning("app %s: removed the left-over address %s", self._section.app, present.address)
        for present in kernel.look().addresses if self._label else ():
            if present.label == self._label:
                netlink.remove(present)
                log.warning("app %s: removed the left-over address %s", self._section.app, present.address)

    def _open_segment(self) -> None:
        try:
            self._segment = Segment(self._link.name, self._link.mac, self._address.ip, self._on_claim)
        except OSError as error:
            raise self._error("acquire", f"no raw socket on {self._link.name}: {error.strerror}") from error

    async def _probe(self) -> None:
        """See that nobody answers for it. An earlier holder whose node and keeper are both dead or frozen has
        it until its lifetime is over, which began before its session ended: so long we ask again."""
        timeout = float(self._declared.probe_timeout)
        if not timeout:
            return
        deadline = system.now() + self._most + EXPIRY_SLACK_SECONDS
        told = False
        while (claim := await self._ask(timeout)) is not None:
            mac = packets.mac_text(claim.mac)
            if system.now() > deadline:
                raise self._error(
                    "probe",
                    f"in use by another host: {mac} answers for it on {self._link.name}",
                    "find it by that hardware address and take the address from it, or declare another one",
                )
            if not told:
                log.warning("app %s: %s still answers for %s; waiting", self._section.app, mac, self)
                told = True
            await asyncio.sleep(_ASK_AGAIN_SECONDS)

    async def _ask(self, timeout: float) -> packets.Claim | None:
        """Who claims it, of those who answer within *timeout* seconds. Asked twice, as frames get lost."""
        assert self._segment is not None
        self._claimed.clear()
        self._claim = None
        for _ in range(2):
            self._segment.probe()
            if await wait_at_most(self._claimed, timeout / 2):
                return self._claim
        return None

    def _put(self) -> int:
        """Put it there; when that was, by the kernel's clock. Blocks; raises OSError, also when the session
        is over: another node may have it by now."""
        # Asked here and not by who calls: between the two this process may have stood still.
        if not (lifetime := self._lifetime()):
            raise OSError(errno.ETIME, "the session is over")
        kernel.put(self._link.index, self._address, lifetime, self._label)
        found = self._find()
        if found is None or found.permanent:
            problem = "is not there" if found is None else "has no lifetime there"
            raise OSError(errno.EADDRNOTAVAIL, f"it was put there, and {problem}")
        return found.created

    def _find(self) -> netlink.Present | None:
        found = netlink.find(self._address.ip)
        return next((present for present in found if present.interface == self._link.index), None)

    def _lifetime(self) -> int:
        """Whole seconds for which it may be there from now on; 0 once the session is over.

        Where the user leaves it to us, no longer than the session as known now.
        """
        left = self._section.session_left_seconds()
        if left <= 0:
            return 0
        return self._most if self._declared.lifetime is not None else math.ceil(min(self._most, left))

    # --- announcing it

    def _announce(self) -> None:
        """At once, and then the rest in the background; what was under way begins anew."""
        if self._segment is None:
            return
        if self._announcing is not None:
            self._announcing.cancel()
        self._segment.announce(router=self._forwards())
        name = f"{self._section.app} announcing {self._declared.address}"
        self._announcing = self._own(self._announce_again(self._segment), name)

    async def _announce_again(self, segment: Segment) -> None:
        for _ in range(self._declared.announcements - 1):
            await asyncio.sleep(float(self._declared.announce_every))
            segment.announce(router=self._forwards())

    def _forwards(self) -> bool:
        if self._address.version == 4:
            return False
        with contextlib.suppress(OSError):
            setting = Path(f"/proc/sys/net/ipv6/conf/{self._link.name}/forwarding")
            return setting.read_text().strip() == "1"
        return False

    # --- keeping it

    def look(self) -> None:
        """Something has changed on the interface: verify now."""
        self._look.set()

    async def _keep(self) -> None:
        """Verify it, and prolong its lifetime, until it is lost."""
        period = self._most / 4
        due = system.now() + period
        while True:
            await wait_at_most(self._look, self._next_look(due))
            self._look.clear()
            # What has changed is looked at, and not prolonged, which would be a change again.
            is_due = system.now() >= due
            try:
                found = await self._in_thread("keep", partial(self._confirm, prolongs=is_due))
            except AddressError as error:
                log.error("%s", error)
                await asyncio.sleep(_ASK_AGAIN_SECONDS)
                continue
            if is_due:
                due = system.now() + period
            if reason := self._judge(found):
                self._lose(reason)
                return

    def _next_look(self, due: float) -> float:
        if self._no_carrier_since is not None:
            due = min(due, self._no_carrier_since + CARRIER_PATIENCE_SECONDS)
        return max(0.01, due - system.now())

    def _confirm(self, *, prolongs: bool) -> _Confirmed:
        """Blocks; raises OSError."""
        link, present = kernel.link(self._link.index), self._find()
        is_here = present is not None and present.created == self._created
        # The lifetime last of all: this process may have stood still before.
        if prolongs and is_here and (lifetime := self._lifetime()):
            kernel.put(self._link.index, self._address, lifetime, self._label)
        return _Confirmed(link, present)

    def _judge(self, found: _Confirmed) -> str:
        """Why it is lost; empty while it is not."""
        link, present = found
        if link is None:
            return f"the interface {self._link.name} is gone"
        if not link.up:
            return f"the interface {link.name} is down"
        if present is None:
            return f"it is not on {link.name} any more: removed by somebody else, or not prolonged in time"
        if present.created != self._created:
            return f"it was removed from {link.name}, and put there anew"
        if link.mac != self._link.mac and self._segment is not None:
            self._segment.use_mac(link.mac)
            self._announce()
        self._link = link
        return self._judge_carrier(link)

    def _judge_carrier(self, link: kernel.Link) -> str:
        if link.carrier:
            if self._no_carrier_since is not None:
                self._no_carrier_since = None
                log.info("app %s: the carrier of %s is back", self._section.app, self)
                self._announce()
            return ""
        now = system.now()
        if self._no_carrier_since is None:
            self._no_carrier_since = now
            log.warning("app %s: %s has no carrier", self._section.app, self)
        lasted = now - self._no_carrier_since
        return (
            f"{link.name} has had no carrier for {lasted:.1f} s" if lasted >= CARRIER_PATIENCE_SECONDS else ""
        )

    def _on_claim(self, claim: packets.Claim) -> None:
        """Another host says that the address is its own, or asks for it."""
        if not self._holds:
            self._claim = claim
            self._claimed.set()
            return
        if claim.asks:
            return  # the kernel answers
        now, mac = system.now(), packets.mac_text(claim.mac)
        if now - self._contested_at < DEFEND_SECONDS:
            self._lose(f"another host claims it again: {mac}")
            return
        self._contested_at = now
        log.warning("app %s: %s claims %s; defending it once", self._section.app, mac, self)
        if self._segment is not None:
            self._segment.announce(router=self._forwards())

    def _lose(self, reason: str) -> None:
        self._on_lost(self._error("keep", reason))

    # --- giving it back

    async def leave(self) -> None:
        """Let go of it as it is: the keeper prolongs it from now on."""
        self._holds = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._segment is not None:
            self._segment.close()

    async def drop(self) -> None:
        """Reset its connections, remove it, see that it is gone, unregister. Raises AddressError."""
        await self.leave()
        withdrawn = await self._in_thread("release", partial(netlink.withdraw, self._address.ip))
        if withdrawn.problem:
            log.warning("app %s: connections of %s: %s", self._section.app, self, withdrawn.problem)
        if withdrawn.addresses:
            log.info(
                "app %s: has given up %s, %d connections reset",
                self._section.app,
                self,
                withdrawn.connections,
                extra={"app": self._section.app},
            )
        self._section.unregister(self._resource.id)

    # --- helpers

    def _own(self, work: asyncio._CoroutineLike[None], name: str) -> asyncio.Task[None]:  # pyright: ignore[reportPrivateUsage]
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("app %s: the task %s failed", self._section.app, task.get_name(), exc_info=error)
            self._lose(f"it is not kept any more: {type(error).__name__}: {error}")

    async def _in_thread(self, step: str, work: Callable[[], T]) -> T:
        """To its end, even if cancelled: what changes the interface must not go on behind our back."""
        try:
            return await child.finish(child.in_thread(work))
        except OSError as error:
            remedy = "give the node CAP_NET_ADMIN" if error.errno == errno.EPERM else ""
            raise self._error(step, error.strerror or str(error), remedy) from error

    def _error(self, step: str, problem: str, remedy: str = "") -> AddressError:
        return AddressError(self._section.app, self._declared.address, step, problem, remedy)
