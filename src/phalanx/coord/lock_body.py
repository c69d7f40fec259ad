"""What the keys of locks and semaphores hold, as JSON; see docs/storage.md."""

from __future__ import annotations

import logging
import re
from enum import StrEnum

import msgspec

from phalanx.decide.lock import Entry, LockState, as_stored
from phalanx.ports import Record
from phalanx.types import SessionId, is_dns_label

log = logging.getLogger("phalanx.locks")

_NONCE = re.compile(r"[A-Za-z0-9_-]+")


class Kind(StrEnum):
    """What a key stands for; also the first part of its name."""

    LOCK = "lock"
    SEMAPHORE = "semaphore"


class Holder(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a lock's key says: its holder, and who waits. ``session`` None: nobody holds it."""

    session: SessionId | None = None
    nonce: str = ""
    epoch: int = 0
    token: int = 0
    since: float = 0.0
    queue: tuple[Entry, ...] = ()
    by: str = ""


class Holders(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a semaphore's key says."""

    permits: int
    holders: tuple[Entry, ...] = ()
    queue: tuple[Entry, ...] = ()
    by: str = ""


_encode = msgspec.json.Encoder().encode
_holder_of = msgspec.json.Decoder(Holder).decode
_holders_of = msgspec.json.Decoder(Holders).decode


def encode_state(kind: Kind, state: LockState) -> bytes:
    """What to store."""
    if kind is Kind.SEMAPHORE:
        return _encode(Holders(state.permits, state.holders, state.queue, state.by))
    if not state.holders:
        return _encode(Holder(queue=state.queue, by=state.by))
    held = state.holders[0]
    return _encode(
        Holder(held.session, held.nonce, held.epoch, held.token, held.since, state.queue, state.by)
    )


def decode_state(kind: Kind, record: Record) -> LockState:
    """What a key says; what can't be read says that nobody holds it, and nobody waits."""
    if record.removed or not record.data:
        return LockState()
    try:
        state = _semaphore_of(record.data) if kind is Kind.SEMAPHORE else _lock_of(record.data)
        for each in (*state.holders, *state.queue):
            _check_session(each.session)
    except (msgspec.DecodeError, ValueError) as error:
        log.error("%s holds no %s (%s); it counts as free", record.subject, kind, error)
        return LockState()
    return as_stored(state, record.revision)


def _semaphore_of(data: bytes) -> LockState:
    many = _holders_of(data)
    return LockState(many.permits, many.holders, many.queue, many.by)


def _lock_of(data: bytes) -> LockState:
    one = _holder_of(data)
    if one.session is None:
        return LockState(1, (), one.queue, one.by)
    held = Entry(one.session, one.nonce, one.epoch, one.token, one.since)
    return LockState(1, (held,), one.queue, one.by)


def _check_session(session: SessionId) -> None:
    """Raise ValueError for what no session is called.

    Programs outside of the nodes may write these keys, and a session that a key names gets tombstones if
    nobody renews it: a name with a dot too many would put them on somebody else's session.
    """
    if not is_dns_label(session.node) or _NONCE.fullmatch(session.nonce) is None:
        raise ValueError(f"{str(session)!r} is no session")


__all__ = ["Holder", "Holders", "Kind", "decode_state", "encode_state"]
