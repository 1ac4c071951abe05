"""Checks of what comes back: every byte, however the bytes are split into packets, or joined in one."""

from .context import Context
from .messages import EVERY_VALUE, make_binary, make_text
from .result import Failure

BYTE_INTERVAL = 0.002  # seconds between two bytes, so that each has a packet of its own
CUT_INTERVAL = 0.1  # seconds in which the server reads the first part of a message
BINARY_SIZE = 65_536  # bytes
SIZES = (1, 2, 20, 21, 1024, 1025, 4096, 16_384, 65_536, 65_537)  # bytes; chunks and buffers often have such sizes
JOINED = [b"message %d\n" % number for number in range(1, 21)]  # fit into one packet
EXTRA_WAIT = 0.1  # seconds in which further replies arrive, if there are any

FIRST_READ = "the server answers its first read instead of the whole message, or decodes each read by itself"


def check_split(context: Context) -> str:
    text = "¡Hola, señal! Más de veinte bytes.\n".encode()
    connection = context.connection()
    for position in range(len(text)):
        connection.send(text[position : position + 1])
        context.wait(lambda: connection.ending, BYTE_INTERVAL)
    context.finish(connection, text, FIRST_READ)
    cut = text.index("ñ".encode()) + 1
    connection = context.connection()
    connection.send(text[:cut])
    context.wait(lambda: connection.ending, CUT_INTERVAL)
    connection.send(text[cut:])
    context.finish(connection, text, FIRST_READ)
    return f"{len(text)} bytes one by one, and cut within a character"


def check_bytes(context: Context) -> str:
    largest = context.settings.size
    for size in sorted({*(each for each in SIZES if each < largest), largest}):
        context.exchange(context.connection(), make_text(size), "a limit of the message size, or of a buffer")
        context.largest = max(context.largest, size)
    for message in (EVERY_VALUE, make_binary(min(BINARY_SIZE, context.largest))):
        context.exchange(context.connection(), message, "a byte value ends the message, or the connection")
    return f"every byte value, messages of 1 to {largest:,} bytes"


def check_joined(context: Context) -> str:
    data = b"".join(JOINED)
    connection = context.connection()
    if context.mode.keeps_open:
        context.exchange(connection, data, "the server answers the first message that it reads, and loses the others")
        return f"{len(JOINED)} messages in one packet, in order"
    connection.send(data)
    context.wait(lambda: connection.ending or connection.lines)
    context.wait(lambda: connection.ending or connection.lines > 1, EXTRA_WAIT)
    if connection.lines > 1:
        raise Failure(f"{connection.lines} replies", "the server answers all that it reads instead of one message")
    context.compare(connection, JOINED[0], "the server reads beyond the first message and answers none")
    return f"the first of {len(JOINED)} messages in one packet"
