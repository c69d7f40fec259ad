"""Whose database folder this is: one of another platform, or of another app, is never taken for ours.

Its replica would look like ours that has lost or gained something, and would be made anew.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from phalanx.data import disk
from phalanx.errors import DatabaseError

if TYPE_CHECKING:
    from phalanx.data.database import AppDatabase


class Owner(msgspec.Struct, frozen=True):
    """``platform``: the platform's identity, which is unique for ever. ``name``: what it is called."""

    platform: str
    name: str
    app: str


class _Identity(msgspec.Struct):
    id: str


async def check_owner(database: AppDatabase) -> None:
    """Write down whose folder it is when it is new. Raises DatabaseError if it is somebody else's."""
    names = database.names
    bucket = names.platform_bucket
    subject = names.key_subject(bucket, names.IDENTITY_KEY)
    record = await database.bus.read(names.bucket_stream(bucket), subject)
    if record is None:
        raise DatabaseError("the platform has no identity", "see: phalanx doctor")
    mine = Owner(msgspec.json.decode(record.data, type=_Identity).id, names.platform, database.app)
    await asyncio.to_thread(_check, database.folder, mine)


def _check(folder: Path, mine: Owner) -> None:
    path = folder / "owner.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Owner)
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        disk.replace_file(path, msgspec.json.encode(mine), "owner")
        return
    except ValueError as error:
        raise DatabaseError(f"{path} is damaged: {error}", "remove it if the folder is this app's") from None
    if (found.platform, found.app) != (mine.platform, mine.app):
        raise DatabaseError(
            f"{folder} belongs to app {found.app!r} of the platform {found.name!r} with identity "
            f"{found.platform}, not to this one ({mine.platform})",
            "move it away, and the database beside it if that belongs to the other one",
        )
