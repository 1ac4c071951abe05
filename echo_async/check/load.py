"""Checks of several clients at once, and of clients that are slow: in sending, in reading."""

import socket
from collections.abc import Callable
from statistics import median

from .connection import Connection
from .context import Context
from .endings import begin_silence
from .messages import make_lines, make_text
from .result import Failure

MAX_DELAY = 0.1  # seconds that a slow client may delay the others
BYTE_INTERVAL = 0.05  # seconds between two bytes of a slow client
SLOW_TEXT = b"slowly...\n"
PROBES = 5  # exchanges of which the median counts
ATTEMPTS = 3  # measurements before a delay counts: another program can be its cause
BACKLOG_SIZE = 4 * 1024 * 1024  # bytes that are sent without reading
FLOOD_SIZE = 4 * BACKLOG_SIZE  # more than the buffers on a path have room for
LINE_SIZE = 16_384  # bytes
RECEIVE_BUFFER_SIZE = 65_536  # bytes; a small one makes the server wait sooner
STALL_TIME = 0.1  # seconds without progress after which the path is full


def check_concurrent(context: Context) -> str:
    """Send the halves of all messages in turn, except that of the first connection, which is silent meanwhile."""
    clients = context.open_many(context.settings.connections)
    messages = [f"client {number}, and only client {number}\n".encode() for number in range(len(clients))]
    owners = {message: number for number, message in enumerate(messages)}
    talking = list(zip(clients, messages, strict=True))[1:]
    for part in (slice(0, 10), slice(10, None)):
        for client, message in talking:
            client.send(message[part])
        context.wait(lambda: False, 0.02)
    context.wait(lambda: all(each.ending or each.lines for each, _ in talking))
    silent = [client for client, _ in talking if not client.received and not client.ending]
    if silent:
        seen = f"{len(silent)} of {len(clients)} connections had no reply while one of them was silent"
        raise Failure(seen, "the server serves one client at a time, or has a limit of connections")
    for number, (client, message) in enumerate(talking, 1):
        received = context.mode.decode(bytes(client.received))
        if received != message and received in owners:
            seen = f"client {number} received the reply to client {owners[received]}"
            raise Failure(seen, "clients share state on the server, such as a global variable or buffer")
        context.compare(client, message, "the server has a limit of connections, or fails with several clients")
    context.exchange(clients[0], messages[0], "a connection that is silent at first is not served")
    begin_silence(context)
    return f"{len(clients)} connections, each with its own reply"


def check_slow(context: Context) -> str:
    delays = {}
    for name, disturb in (("sends a byte per 50 ms", _send_slowly), ("does not read", _read_nothing)):
        for _ in range(ATTEMPTS):
            usual = median(context.measure() for _ in range(PROBES))
            delays[name] = max(0.0, disturb(context) - usual)
            context.close_connections()
            if delays[name] <= MAX_DELAY:
                break
        else:
            seen = f"others were delayed by {1e3 * delays[name]:.0f} ms by a client that {name}"
            raise Failure(seen, "the server waits for one client while others have sent: a blocking call in a loop")
    return f"others were delayed by at most {1e3 * max(delays.values()):.0f} ms"


def _send_slowly(context: Context) -> float:
    slow = context.open()
    position = 0

    def send_byte() -> None:
        nonlocal position
        slow.send(SLOW_TEXT[position % len(SLOW_TEXT) :][:1])
        position += 1

    send_byte()
    return _measure_beside(context, send_byte)


def _read_nothing(context: Context) -> float:
    _send_unread(context, context.open(), FLOOD_SIZE)
    return _measure_beside(context, lambda: None)


def _measure_beside(context: Context, disturb: Callable[[], None]) -> float:
    times = []
    for _ in range(PROBES):
        context.wait(lambda: False, BYTE_INTERVAL)
        disturb()
        times.append(context.measure(disturb, BYTE_INTERVAL))
    return median(times)


def _send_unread(context: Context, connection: Connection, size: int) -> bytes:
    """Send messages of ``size`` bytes in all, and receive nothing; return them."""
    largest = context.largest
    data = make_lines(size, min(LINE_SIZE, largest)) if context.mode.keeps_open else make_text(largest)
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_SIZE)
    connection.is_reading = False
    connection.send(data)
    return data


def check_backpressure(context: Context) -> str:
    connection = context.open()
    data = _send_unread(context, connection, BACKLOG_SIZE)
    left = len(data) + 1
    while len(connection.unsent) < left:
        left = len(connection.unsent)
        context.wait(lambda: not connection.unsent, STALL_TIME)
    connection.resume()
    context.finish(connection, data, "the connection of a client that does not read is cut, or replies are discarded")
    waited = f"the server waited after {len(data) - left:,}" if left else "the path took all of them"
    return f"{len(data):,} bytes, read after they were sent; {waited}"
