"""What is in an app's WAL log: records, each with one LTX file, and seals, which part the reigns.

Both say under which epoch they were written, and carry a nonce by which their writer finds them again. Body
and headers of each kind are described in docs/storage.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

import msgspec

from phalanx.ports import Record

EPOCH, TXID, COMMITS, NONCE = "Phalanx-Epoch", "Phalanx-TXID", "Phalanx-Commits", "Phalanx-Nonce"
OBJECT, SIZE, DIGEST = "Phalanx-Object", "Phalanx-Size", "Phalanx-Digest"


class SealKind(StrEnum):
    """OPEN begins a reign; CLOSE ends one in good order: nothing of it is missing from the log."""

    OPEN = "open"
    CLOSE = "close"


class Seal(msgspec.Struct, frozen=True):
    """The limit of a reign. ``txid``: the last transaction in the log before it. ``time``: Unix seconds."""

    sequence: int
    epoch: int
    node: str
    txid: int
    kind: SealKind
    reason: str = ""
    nonce: str = ""
    time: float = 0.0


class ObjectPointer(msgspec.Struct, frozen=True):
    """Where the content of a record is that is too large for a message."""

    name: str
    size: int
    digest: str


class LogRecord(msgspec.Struct, frozen=True):
    """One LTX file in the log: ``data``, or what ``pointer`` leads to. ``commits``: how many transactions
    are in it, None where that is unknown. ``time``: when it was stored, Unix seconds."""

    sequence: int
    epoch: int
    txid: int
    data: bytes = b""
    pointer: ObjectPointer | None = None
    commits: int | None = None
    nonce: str = ""
    time: float = 0.0

    @property
    def size(self) -> int:
        """Of the LTX file, in bytes."""
        return self.pointer.size if self.pointer is not None else len(self.data)


class Claim(msgspec.Struct, frozen=True):
    """A leader of *epoch* is about to seal. It changes nothing in the database, but takes a sequence: so an
    older leader that writes as fast as it can is stopped."""

    sequence: int
    epoch: int
    nonce: str = ""
    time: float = 0.0


class Foreign(msgspec.Struct, frozen=True):
    """Something in the log that Phalanx did not write, or not so. It changes nothing in the database."""

    sequence: int
    problem: str
    nonce: str = ""
    time: float = 0.0


LogEntry: TypeAlias = Seal | LogRecord | Claim | Foreign


class Draft(msgspec.Struct, frozen=True):
    """A record that is to be appended: an LTX file, or its content. The same draft is stored only once,
    however often it is tried."""

    epoch: int
    txid: int
    content: bytes | Path
    size: int
    commits: int | None = None
    nonce: str = msgspec.field(default_factory=lambda: secrets.token_hex(8))

    def headers(self, pointer: ObjectPointer | None) -> dict[str, str]:
        """What goes with it into the log."""
        headers = {EPOCH: str(self.epoch), TXID: str(self.txid), NONCE: self.nonce}
        if self.commits is not None:
            headers[COMMITS] = str(self.commits)
        if pointer is not None:
            headers |= {OBJECT: pointer.name, SIZE: str(pointer.size), DIGEST: pointer.digest}
        return headers


class _SealBody(msgspec.Struct):
    epoch: int
    node: str
    txid: int
    kind: SealKind
    reason: str = ""


_decode_seal = msgspec.json.Decoder(_SealBody).decode
_encode = msgspec.json.Encoder().encode


def seal_body(epoch: int, node: str, txid: int, kind: SealKind, reason: str) -> bytes:
    """The JSON of a seal."""
    return _encode(_SealBody(epoch, node, txid, kind, reason))


def seal_headers(epoch: int, nonce: str) -> dict[str, str]:
    """What goes with a seal into the log."""
    return {EPOCH: str(epoch), NONCE: nonce}


def parse(record: Record) -> LogEntry:
    """What a stored message of the log says; never raises."""
    headers = record.headers
    try:
        if record.subject.endswith(".wal.ltx"):
            return _record(record, headers)
        if record.subject.endswith(".wal.seal"):
            body = _decode_seal(record.data)
            return Seal(
                record.revision,
                body.epoch,
                body.node,
                body.txid,
                body.kind,
                body.reason,
                headers.get(NONCE, ""),
                record.time,
            )
        if record.subject.endswith(".wal.claim"):
            return Claim(record.revision, int(headers[EPOCH]), headers.get(NONCE, ""), record.time)
        problem = "an unknown subject"
    except KeyError as error:
        problem = f"no header {error.args[0]}"
    except ValueError as error:  # msgspec's errors are ValueErrors, too
        problem = str(error)
    return Foreign(record.revision, f"{record.subject}: {problem}", headers.get(NONCE, ""), record.time)


def _record(record: Record, headers: Mapping[str, str]) -> LogRecord:
    pointer = None
    if OBJECT in headers:
        pointer = ObjectPointer(headers[OBJECT], int(headers[SIZE]), headers[DIGEST])
    return LogRecord(
        record.revision,
        int(headers[EPOCH]),
        int(headers[TXID]),
        record.data,
        pointer,
        int(headers[COMMITS]) if COMMITS in headers else None,
        headers.get(NONCE, ""),
        record.time,
    )
