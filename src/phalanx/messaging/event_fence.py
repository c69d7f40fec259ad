"""The fence of an app's events: a message among them, which each new leader writes anew.

A leader's event carries an expectation of the last sequence of the fence's subject, as it was when that
leader wrote it; so once another leader has, the server refuses it. Both are in one stream, where alone the
server can compare them.

* A new leader seals before anything of its section runs: it reads the fence, finds an older epoch (a newer
  one means that it is deposed), and replaces exactly that message (compare-and-set).
* ``max_age`` does not remove the fence (its TTL is "never"), but ``max_bytes`` or an operator's purge can.
  Then whoever needs it writes it anew, a deposed leader that wakes up as well: epochs in the fence can go
  back. Nothing hangs on that, as nobody publishes under a fence before it has found the leader key its own
  *after* that fence was stored. Whoever leads later seals later, so from then on that fence is not the last
  one any more; and should that seal be gone in turn, there is none, which is refused just the same.
"""

from __future__ import annotations

import asyncio
import logging
import random

import msgspec

from phalanx import system
from phalanx.errors import BusError, BusTimeout, BusUnavailable, Fenced, WrongRevision
from phalanx.names import FENCE_KEY, LEADER_KEY, Names
from phalanx.ports import Bus, Fence, Record

log = logging.getLogger("phalanx.events")

SEAL_SECONDS = 10.0
ANSWER_SECONDS = 1.0
RETRY_SECONDS = (0.01, 0.3)

_NEVER = {"Nats-TTL": "never"}  # ADR-43


class FenceBody(msgspec.Struct, frozen=True):
    """What the message says: the epoch of the leader that wrote it, and on which node."""

    epoch: int
    node: str


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(FenceBody).decode


class EventFence:
    """Writes the fence of one app, from one node."""

    def __init__(self, bus: Bus, names: Names, app: str, node: str) -> None:
        self._bus, self._app, self._node = bus, app, node
        self._stream, self._subject = names.events_stream(app), names.event_fence_subject(app)
        bucket = names.app_bucket(app)
        self._bucket = names.bucket_stream(bucket)
        self._leader_key = names.key_subject(bucket, LEADER_KEY)
        self._beside = names.key_subject(bucket, FENCE_KEY)

    async def seal(self, epoch: int, timeout: float = SEAL_SECONDS) -> Fence:
        """Have no leader of an earlier epoch publish from now on. What events of this one carry.

        Raises Fenced, BusError.
        """
        deadline = system.now() + timeout
        delay, longest = RETRY_SECONDS
        while True:
            try:
                return await self._try_to_seal(epoch)
            except WrongRevision as error:
                problem: BusError = error  # somebody wrote between look and write, or it was ours: look again
            except (BusUnavailable, BusTimeout) as error:
                problem = error
            if system.now() >= deadline:
                raise BusTimeout(f"fence of the events of {self._app}", str(problem)) from problem
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(longest, 2 * delay)

    async def _try_to_seal(self, epoch: int) -> Fence:
        found = await self._bus.read(self._stream, self._subject, timeout=ANSWER_SECONDS)
        sealed = _epoch_of(found) if found is not None else 0
        if sealed > epoch:
            raise Fenced(self._app, epoch)
        if found is None or sealed < epoch:
            revision = await self._bus.write(
                self._subject,
                _encode(FenceBody(epoch, self._node)),
                expect=found.revision if found is not None else 0,
                headers=_NEVER,
                timeout=ANSWER_SECONDS,
            )
        else:
            revision = found.revision  # ours, of which the answer was lost, or which was not checked yet
        await self._check_leading(epoch)
        return Fence(self._subject, revision)

    async def _check_leading(self, epoch: int) -> None:
        """By a write: a server that leads the bucket no more may answer a read. Raises Fenced, BusError."""
        leading = Fence(self._leader_key, epoch)
        try:
            await self._bus.write(self._beside, fence=leading, timeout=ANSWER_SECONDS)
        except WrongRevision:
            found = await self._bus.read(self._bucket, self._leader_key, timeout=ANSWER_SECONDS)
            if found is None or found.revision != epoch:
                raise Fenced(self._app, epoch) from None
            raise  # it only collided with another write


def _epoch_of(record: Record) -> int:
    try:
        return _decode(record.data).epoch
    except msgspec.MsgspecError:
        log.error("%s holds what is no fence; it is replaced", record.subject)
        return 0


__all__ = ["EventFence", "FenceBody"]
