"""Dropping virtual addresses: what the keeper does with a registered ``vip`` when its node has died."""

from __future__ import annotations

import ipaddress
import logging

from phalanx import netlink
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
