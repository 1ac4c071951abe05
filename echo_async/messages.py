"""What a message is: text or bytes in, one line of bytes out; and bytes from a server as text that is safe to show."""

from __future__ import annotations

from .errors import MessageError
from .logs import escape

__all__ = ["encode", "readable"]


def encode(message: str | bytes) -> bytes:
    """``message`` as it goes over the wire: UTF-8, and a newline at its end, added if it has none."""
    if isinstance(message, str):
        try:
            data = message.encode()
        except UnicodeEncodeError as error:
            raise MessageError(f"the message cannot be sent as UTF-8: {error}; send bytes") from error
    elif isinstance(message, bytes):
        data = message
    else:
        raise TypeError(f"a message is str or bytes, not {type(message).__name__}")
    newline = data.find(b"\n")
    if newline < 0:
        return data + b"\n"
    if newline < len(data) - 1:
        raise MessageError(f"the message has a newline inside, at byte {newline}; send its lines one by one")
    return data


def readable(data: bytes) -> str:
    r"""``data`` as text for a terminal or an error: what is not UTF-8, or would drive a terminal, as ``\xNN``."""
    text = data.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else escape(c) for c in text)
