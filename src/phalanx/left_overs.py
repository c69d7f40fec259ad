"""What an earlier life of this node has left running ends before this life looks at anything else.

The keeper of each session ends it too, but it begins only once NATS is reached. A node that was killed
together with its keeper and its warden, and that comes back while NATS is away, must not let that run on.
"""

from __future__ import annotations

import logging
from pathlib import Path

from phalanx import system
from phalanx.keeper import fencing, note
from phalanx.keeper.warden import take_lock

log = logging.getLogger("phalanx.node")


async def end_left_overs(data_dir: Path) -> None:
    """Kill what is registered in *data_dir*, unless a node runs there, or a keeper that lives keeps it for
    the next one. Never raises: what does not die, or cannot be known, is for the keeper, which refuses to
    begin beside it. Takes some seconds at most.
    """
    if not (data_dir / fencing.REGISTERED).is_file():
        return
    try:
        lock = system.lock_file(data_dir / "lock")
    except OSError:
        return  # a node runs there, or the folder cannot be used: whoever starts says so
    try:
        kept = note.read(data_dir)
        if kept is None or not kept.lives:
            await _end(data_dir)
    except (OSError, TimeoutError, fencing.LeftOversUnknown) as error:
        log.warning("what an earlier life of this node has left: %s", error)
    finally:
        lock.release()


async def _end(data_dir: Path) -> None:
    wardens = await take_lock(data_dir)
    try:
        left = fencing.Registry(data_dir).left_over()
        if left and not await fencing.kill_resources(left):
            log.error("not all that an earlier life of this node has left is gone yet")
    finally:
        if wardens is not None:
            wardens.release()


__all__ = ["end_left_overs"]
