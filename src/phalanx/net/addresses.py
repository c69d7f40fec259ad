"""The virtual addresses of one app on this node."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from phalanx.config import VirtualIP
from phalanx.errors import AddressError
from phalanx.ports import SectionContext


class Addresses:
    """Implements ``ports.SectionAddresses``."""

    def __init__(self, app: str, declared: Sequence[VirtualIP], ttl_seconds: float) -> None:
        self._app, self._declared, self._ttl_seconds = app, tuple(declared), ttl_seconds
        self._lost: asyncio.Future[str] | None = None

    async def acquire(self, section: SectionContext) -> None:
        """See ``ports.SectionAddresses.acquire``."""
        raise AddressError(self._app, self._declared[0].address, "prepare", "not built yet")

    @property
    def lost(self) -> asyncio.Future[str]:
        """See ``ports.SectionAddresses.lost``."""
        if self._lost is None:
            self._lost = asyncio.get_running_loop().create_future()
        return asyncio.shield(self._lost)

    async def release(self) -> None:
        """See ``ports.SectionAddresses.release``."""

    async def check(self) -> None:
        """See ``ports.SectionAddresses.check``."""
        raise AddressError(self._app, self._declared[0].address, "prepare", "not built yet")

    def ineligible_because(self) -> str:
        """See ``ports.SectionAddresses.ineligible_because``."""
        return "virtual addresses are not built yet"
