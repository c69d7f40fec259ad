"""Which partition of a ring a key belongs to. Stable for ever: data lies where this says.

The function, in words, so that any language can do it (docs/ring.md has test vectors): take the first
four bytes of the SHA-256 of the key's UTF-8 bytes as an unsigned big-endian number, and of that the
remainder by the number of partitions. SHA-256 because every standard library has it, and because nobody
can choose keys that all fall into one partition without trying them out.
"""

from __future__ import annotations

import hashlib

MAX_PARTITIONS = 16_384
"""Partitions of one ring: each is a key in the app's bucket. A divisor of 2**32, as the hash has 32 bits:
with fewer partitions that are no power of two, some are larger than others by less than 1 in 262,144."""


def partition_of(key: str | bytes, partitions: int) -> int:
    """The partition, from 0, of *key* in a ring of *partitions*. Text counts as its UTF-8 bytes.

    Raises ValueError for text that is no Unicode (lone surrogates), and where *partitions* is not 1 …
    MAX_PARTITIONS.
    """
    if not 1 <= partitions <= MAX_PARTITIONS:
        raise ValueError(f"partitions = {partitions}: choose 1 to {MAX_PARTITIONS}")
    data = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big") % partitions
