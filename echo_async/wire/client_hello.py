"""The server name in a ClientHello, without IO. The ssl module reports it to a callback, unless it is not ASCII."""

from __future__ import annotations

from .text import escape

MAX_SIZE = 16 * 1024  # bytes of a ClientHello that are searched
SERVER_NAME, HOST_NAME = 0, 0  # the extension, and the kind of a name in it (RFC 6066 section 3)


def find_server_name(received: bytearray) -> str | None:
    """Return the name, escaped, in a handshake that begins with a ClientHello (RFC 8446 section 4).

    It may be invalid: OpenSSL refuses it then. None if there is none, or not yet.
    """
    size = 4 + int.from_bytes(received[1:4], "big")  # type, size, message
    if len(received) < min(size, MAX_SIZE):
        return None
    message = bytes(received[4:size])
    position = 2 + 32  # version, random
    for length_size in (1, 2, 1):  # session ID, cipher suites, compression methods
        position = _end_of_vector(message, position, length_size)
    position += 2  # the size of all extensions
    while position < len(message):
        end = _end_of_vector(message, position + 2, 2)
        if int.from_bytes(message[position : position + 2], "big") == SERVER_NAME:
            name = message[position + 6 : end]  # after the kind of extension, its size, and that of the list
            is_host_name = name[:1] == bytes([HOST_NAME])
            return escape(name[3:].decode("utf-8", "backslashreplace")) if is_host_name else None  # OpenSSL allows one
        position = end
    return None


def _end_of_vector(data: bytes, position: int, length_size: int) -> int:
    """Return where a vector ends that has its size in front."""
    start = position + length_size
    return start + int.from_bytes(data[position:start], "big")
