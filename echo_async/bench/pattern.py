"""The bytes that a load sends: different messages in one block, which is made once and sent repeatedly.

Each chunk of a reply is compared with the same block by one ``memcmp`` and without a copy, however the
network splits the replies. A byte that is wrong, missing, duplicated or from another connection does not match.
"""

import random

MAX_IO_SIZE = 262_144  # bytes of one read or write
MAX_MESSAGES = 4096  # different messages in the block
PRINTABLE = bytes(33 + byte % 94 for byte in range(256))


class Pattern:
    """``length`` bytes of different messages of ``size`` bytes; ``data`` repeats them for MAX_IO_SIZE more bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.messages = max(2, min(MAX_MESSAGES, MAX_IO_SIZE // size))
        self.length = self.messages * size
        block = bytearray(random.Random(size).randbytes(self.length).translate(PRINTABLE))
        block[size - 1 :: size] = b"\n" * self.messages
        repeats = 1 + -(-MAX_IO_SIZE // self.length)
        self.data = bytes(block) * repeats
        self.view = memoryview(self.data)

    def start_offset(self, connection: int) -> int:
        """Return the offset of a connection's first message; it differs, so that replies to others do not match."""
        return connection * 7919 % self.messages * self.size

    def matching_prefix_length(self, data: bytes, offset: int) -> int:
        """Return how many bytes at the start of ``data`` match the pattern from ``offset`` on."""
        low, high = 0, len(data)
        while low < high:
            middle = (low + high + 1) // 2
            if self.data.startswith(data[:middle], offset):
                low = middle
            else:
                high = middle - 1
        return low


class Batches(dict[int, memoryview]):
    """Views of ``size`` bytes by their offset, each created once."""

    def __init__(self, view: memoryview, size: int) -> None:
        super().__init__()
        self._view = view
        self._size = size

    def __missing__(self, offset: int) -> memoryview:
        view = self[offset] = self._view[offset : offset + self._size]
        return view
