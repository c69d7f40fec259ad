"""That something of an app runs in this process, as its node's keeper and alarm know it."""

from __future__ import annotations

import asyncio

from phalanx.app.parts import NodeParts
from phalanx.types import Resource


class SharedPresence:
    """One section for all that runs of an app here at a time, from the first that enters to the last that
    leaves: when the session is over the keeper kills the node as long as there is one."""

    def __init__(self, parts: NodeParts, app: str, what: str) -> None:
        self._parts = parts
        self._resource = Resource("section", f"{app}.{what}", app, 0)
        self._count = 0
        self._turn = asyncio.Lock()

    async def enter(self) -> None:
        """Returns once the keeper knows: only then may anything run. Raises SessionLost."""
        async with self._turn:
            if not self._count:
                self._parts.section_begins()
                try:
                    await self._parts.register(self._resource)
                except BaseException:
                    self._parts.section_has_ended()
                    raise
            self._count += 1

    def leave(self) -> None:
        """Nothing of one that had entered runs any more."""
        self._count -= 1
        if not self._count:
            self._parts.unregister(self._resource.id)
            self._parts.section_has_ended()


__all__ = ["SharedPresence"]
