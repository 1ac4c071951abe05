"""What the checks send: text that shows where it was cut or moved, and every byte value."""

from functools import cache
from random import Random


@cache
def _pattern(size: int) -> bytes:
    """Return numbered blocks of 8 bytes, at least ``size`` bytes of them."""
    return "".join(map("{:07d} ".format, range(size // 8 + 1))).encode()


def make_text(size: int) -> bytes:
    return _pattern(size)[: size - 1] + b"\n"


def make_lines(size: int, message_size: int) -> bytes:
    """Return messages of ``message_size`` bytes, at least 16, together ``size`` bytes; each has its number."""
    text = _pattern(message_size)
    numbers = (b"%d " % number for number in range(size // message_size))
    return b"".join((number + text)[: message_size - 1] + b"\n" for number in numbers)


def make_binary(size: int) -> bytes:
    """Return a message of ``size`` bytes of every value but the newline, at random, and of the newline at its end."""
    return Random(size).randbytes(size - 1).replace(b"\n", b"\0") + b"\n"


EVERY_VALUE = bytes(range(256)).replace(b"\n", b"") + b"\n"
