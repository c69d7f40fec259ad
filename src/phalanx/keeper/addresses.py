"""Virtual addresses in the keeper's hands: dropped when its node has died, prolonged while it is away."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
from collections.abc import Callable, Sequence

from phalanx import netlink, system
from phalanx.aio import wait_at_most
from phalanx.types import Resource

log = logging.getLogger("phalanx.keeper")


def drop(resource: Resource) -> bool:
    """Reset the connections of a registered address and take it away; True once it is seen to be gone.

    Takes milliseconds. It may be called again and again, and for what was never put there. The address of a
    newer section is left alone: it was created at another time.
    """
    details = resource.details
    try:
        address = ipaddress.ip_interface(details["address"]).ip
        withdrawn = netlink.withdraw(
            address, created=int(details.get("created") or 0), label=details.get("label", "")
        )
    except (OSError, KeyError, ValueError) as error:
        log.error("app %s: the address %s cannot be dropped: %s", resource.app, details.get("address"), error)
        return False
    if withdrawn.addresses:
        log.warning(
            "app %s: dropped the address %s of epoch %d, %d connections reset",
            resource.app,
            address,
            resource.epoch,
            withdrawn.connections,
        )
    return True


def prolong(resource: Resource, valid_until: float) -> bool:
    """Keep a registered address here as its node would: by its lifetime, and no longer than the session is
    valid as known now. False if it is not here any more. Blocks for milliseconds; raises OSError, ValueError.
    """
    details = resource.details
    address, created = ipaddress.ip_interface(details["address"]).ip, int(details["created"])
    present = next((one for one in netlink.find(address) if one.created == created), None)
    if present is None:
        return False
    # Asked last of all: before that this process may have stood still.
    left, most = valid_until - system.now(), int(details["lifetime"])
    if left > 0:
        netlink.prolong(present, most if details.get("fixed") else math.ceil(min(most, left)))
    return True


class Prolonging:
    """Prolongs *resources*' addresses every *period* seconds until it is stopped."""

    def __init__(
        self, resources: Sequence[Resource], valid_until: Callable[[], float], period: float
    ) -> None:
        self._resources = [resource for resource in resources if resource.kind == "vip"]
        self._valid_until, self._period = valid_until, period
        self._stopped = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="keeper prolonging addresses")

    async def stop(self) -> None:
        """Return once nothing is prolonged any more: what is dropped then does not come back."""
        self._stopped.set()
        await self._task

    async def _run(self) -> None:
        while self._resources and not self._stopped.is_set():
            for resource in list(self._resources):
                await self._prolong(resource)
            await wait_at_most(self._stopped, self._period)

    async def _prolong(self, resource: Resource) -> None:
        address = resource.details.get("address")
        try:
            is_here = await asyncio.to_thread(prolong, resource, self._valid_until())
        except (OSError, KeyError, ValueError) as error:
            log.error("app %s: the address %s is not prolonged: %s", resource.app, address, error)
        else:
            if not is_here:
                log.error("app %s: the address %s is not here any more", resource.app, address)
                self._resources.remove(resource)


__all__ = ["Prolonging", "drop", "prolong"]
