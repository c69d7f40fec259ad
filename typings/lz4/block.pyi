# What Phalanx uses of lz4.block, which comes without types.
from typing import Literal

class LZ4BlockError(Exception): ...

def compress(
    source: bytes | bytearray | memoryview,
    mode: Literal["default", "fast", "high_compression"] = ...,
    acceleration: int = ...,
    store_size: bool = ...,
) -> bytes: ...
def decompress(source: bytes | bytearray | memoryview, uncompressed_size: int = ...) -> bytes: ...
