# What Phalanx uses of lz4.frame, which comes without types.
def compress(
    data: bytes | bytearray | memoryview,
    compression_level: int = ...,
    block_size: int = ...,
    block_linked: bool = ...,
    content_checksum: bool = ...,
    block_checksum: bool = ...,
    store_size: bool = ...,
) -> bytes: ...

class LZ4FrameDecompressor:
    eof: bool
    needs_input: bool
    unused_data: bytes | None
    def decompress(self, data: bytes | bytearray | memoryview, max_length: int = ...) -> bytes: ...
