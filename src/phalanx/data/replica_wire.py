"""What a node and its replica process say to each other over a socket pair: msgpack, each with its length.

Requests are answered in order. Number 0 is what the process says unasked: a line for the node's log.
"""

from __future__ import annotations

from typing import Any

import msgspec

from phalanx.data.replica_state import ReplicaState
from phalanx.errors import DatabaseError, LtxError

LENGTH_BYTES = 4

_LTX = "LTX file: "


class Request(msgspec.Struct, frozen=True, array_like=True):
    """Call ``operation`` of the replica."""

    number: int
    operation: str
    arguments: tuple[Any, ...] = ()


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """A DatabaseError (``damaged``: an LtxError)."""

    problem: str
    remedy: str = ""
    damaged: bool = False

    @classmethod
    def of(cls, error: DatabaseError | OSError) -> Failure:
        """What is said of *error*."""
        if isinstance(error, OSError):
            return cls(f"{error.filename or 'the replica'}: {error.strerror or error}")
        return cls(error.problem, error.remedy, isinstance(error, LtxError))

    def error(self) -> DatabaseError:
        """The error, as it was raised in the process."""
        if self.damaged:
            return LtxError(self.problem.removeprefix(_LTX))
        return DatabaseError(self.problem, self.remedy)


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """To a request, with the state afterwards; or, as number 0, a line for the log: level and text."""

    number: int
    result: Any = None
    failure: Failure | None = None
    state: ReplicaState | None = None


encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def framed(message: Request | Reply) -> bytes:
    """The message as it is sent."""
    data = encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data
