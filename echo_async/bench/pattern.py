"""What is sent: messages that differ from their neighbours, in one block that is made once and sent round and round.

A reply is compared where it is read, whatever pieces it comes in, against the same block: no copy, one
``memcmp``. A byte that is wrong, missing, doubled or of another connection does not fit.
"""

from __future__ import annotations

import random

__all__ = ["MAX_IO_SIZE", "Pattern"]

MAX_IO_SIZE = 262_144  # bytes of one read or write
MESSAGES = 4096  # different ones, where that many fit into MAX_IO_SIZE

PRINTABLE = bytes(33 + byte % 94 for byte in range(256))


class Pattern:
    """``length`` bytes of different messages of ``size`` bytes each; ``data`` goes round for MAX_IO_SIZE bytes more."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.messages = max(2, min(MESSAGES, MAX_IO_SIZE // size))
        self.length = self.messages * size
        block = bytearray(random.Random(size).randbytes(self.length).translate(PRINTABLE))
        block[size - 1 :: size] = b"\n" * self.messages
        rounds = 1 + -(-MAX_IO_SIZE // self.length)
        self.data = bytes(block) * rounds
        self.view = memoryview(self.data)

    def start(self, connection: int) -> int:
        """Where a connection begins: each at another message, so that replies to the wrong one are seen."""
        return connection * 7919 % self.messages * self.size

    def difference(self, data: bytes, at: int) -> int:
        """How many bytes of ``data`` are those of the pattern from ``at`` on."""
        low, high = 0, len(data)
        while low < high:
            middle = (low + high + 1) // 2
            if self.data.startswith(data[:middle], at):
                low = middle
            else:
                high = middle - 1
        return low
