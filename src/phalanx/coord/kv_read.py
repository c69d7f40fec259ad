"""Reads of several keys of a bucket at one moment: lately, or now."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from phalanx import system
from phalanx.errors import BusTimeout, ConfigError, WrongRevision
from phalanx.ports import Bus, Fence, Record

HEADERS_BYTES = 512
"""Kept free for headers: the server's limit counts them too."""

REFUSALS = 10
"""How often something is tried again that was refused although nothing speaks against it."""

READ_SECONDS = 2.0
"""How long a linearizable read looks for a replica that is up to date."""

AT_ONCE = 64
"""Requests of one call that are under way at the same time."""


class Reads:
    """Of the bucket behind *stream*. *barrier*: a subject of it that may be written to without harm; as many
    messages stay there as the bucket keeps of any key."""

    def __init__(self, bus: Bus, stream: str, barrier: str) -> None:
        self._bus, self._stream, self._barrier = bus, stream, barrier

    async def now(self, subjects: Sequence[str]) -> dict[str, Record]:
        """The last records of *subjects* at one moment of this call.

        A write has to pass through the real leader and a majority. A replica that holds it holds whatever
        was acknowledged before it, too. One that does not (it lags, or was cut off) is asked again.
        Raises BusTimeout, also when none was found in time.
        """
        barrier = await self._bus.write(self._barrier)
        deadline, attempt = system.now() + READ_SECONDS, 0
        while True:
            records = await self._read([*subjects, self._barrier])
            reached = records.pop(self._barrier, None)
            if reached is not None and reached.revision >= barrier:
                missing = [subject for subject in subjects if subject not in records]
                if await _all(self._is_absent, missing):
                    return records
            if system.now() >= deadline:
                raise BusTimeout("read", f"no replica that is up to date answered within {READ_SECONDS:g} s")
            attempt += 1
            await pause(min(attempt, REFUSALS))

    async def _is_absent(self, subject: str) -> bool:
        """Whether it holds nothing: by a write that is stored only then. A refusal proves nothing.

        A replica that does not show it may just have been replacing it.
        """
        try:
            await self._bus.write(self._barrier, fence=Fence(subject, 0))
        except WrongRevision:
            return False
        return True

    async def lately(self, subjects: Sequence[str]) -> dict[str, Record]:
        """The last records of *subjects* at one moment, by any replica. One that it does not show is looked
        for at the leader."""
        records: dict[str, Record] = {}
        for attempt in range(REFUSALS):
            await pause(attempt)
            records = await self._read(subjects)
            missing = [subject for subject in subjects if subject not in records]
            if await _all(self._is_gone, missing):
                break
        return records

    async def _is_gone(self, subject: str) -> bool:
        return await self._bus.read(self._stream, subject) is None

    async def _read(self, subjects: Sequence[str]) -> dict[str, Record]:
        if sum(map(len, subjects)) + 3 * len(subjects) > self._bus.max_payload - HEADERS_BYTES:
            raise ConfigError("keys", len(subjects), "are too long together", "read them in parts")
        records = await self._bus.read_many(self._stream, subjects)
        return {record.subject: record for record in records}


async def _all(holds: Callable[[str], Awaitable[bool]], subjects: Sequence[str]) -> bool:
    """Whether it holds of all *subjects*; a few are asked at a time. Raises what one of them raises."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def ask(subject: str) -> bool:
        async with gate:
            return await holds(subject)

    answers = await asyncio.gather(*map(ask, subjects), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return all(answers)


async def pause(attempt: int) -> None:
    """Before trying again for the *attempt*-th time: up to 0.2 s for the tenth."""
    await asyncio.sleep(random.uniform(0, 0.002 * attempt**2))
