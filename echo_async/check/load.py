"""Checks of several clients at once, and of clients that are slow: in sending, in reading."""

from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import median
from time import monotonic

from .connection import Connection
from .context import Context
from .endings import begin_silence
from .explanation import quote
from .messages import make_lines, make_text
from .result import Failure

MAX_DELAY = 0.1  # seconds that a slow client may delay the others
BYTE_INTERVAL = 0.05  # seconds between two bytes of a slow client
SLOW_TEXT = b"slow.\n"
PROBES = 3  # exchanges of which the median counts
ROUNDS = 3  # of them, beside the same slow client
ATTEMPTS = 5  # measurements before a delay counts: another program can be its cause
BACKLOG_SIZE = 4 * 1024 * 1024  # bytes that are sent without reading
FLOOD_SIZE = 4 * BACKLOG_SIZE  # more than the buffers on a path have room for
LINE_SIZE = 16_384  # bytes
PART_INTERVAL = 0.02  # seconds between the halves of messages
STALL_ATTEMPTS = 2  # connections
STALL_TIME = 0.1  # seconds without progress after which the path is full, or has taken all

ONE_BLOCKS_OTHERS = "the server waits for one client while others have sent something: a blocking call in a loop"

NOT_ALL_REPLIES = "the connection of a client that does not read is cut, or replies are lost"


def check_concurrent(context: Context) -> str:
    """Send the halves of all messages in turn, except that of the first connection, which is silent meanwhile."""
    numbers = range(context.settings.connections)
    opened, failure = context.open_many([f"client {number} is connected\n".encode() for number in numbers])
    if context.mode.keeps_open:
        _compare_all(context, opened)
    if failure is not None:
        raise Failure(f"{len(opened)} of {len(numbers)} connections, then: {failure.seen}", failure.reason)
    (first, _), *others = opened
    pairs = [(client, f"client {number}, and no other\n".encode()) for number, (client, _) in enumerate(others)]
    for part in (slice(0, 10), slice(10, None)):
        for client, message in pairs:
            client.send(message[part])
        context.wait(lambda: False, PART_INTERVAL)
    context.wait(lambda: all(client.ending or client.lines for client, _ in pairs))
    _compare_all(context, pairs)
    context.exchange(first, b"the first client\n", "a connection that is silent at first is not served")
    begin_silence(context)
    return f"{len(opened)} connections, each with its own reply"


def _compare_all(context: Context, pairs: Sequence[tuple[Connection, bytes]]) -> None:
    messages = {message for _, message in pairs}
    if not all(client.received for client, _ in pairs):
        context.wait(lambda: False, PART_INTERVAL)  # a reply that is missing may have reached another client
    for client, message in pairs:
        received = context.mode.decode(bytes(client.received)).splitlines(keepends=True)
        if others := set(received) & messages - {message}:
            seen = f"a client received the reply to another one: {quote(others.pop())} instead of {quote(message)}"
            raise Failure(seen, "the server uses one variable or buffer for several clients")
    if count := sum(not client.received for client, _ in pairs):
        seen = f"no reply on {count} of {len(pairs)} connections that are open at once"
        raise Failure(seen, "the server serves one client at a time, or a limited number of them")
    for client, message in pairs:
        context.compare(client, message, "the server fails with several clients at once")


def check_slow(context: Context) -> str:
    delays = {}
    for name, start in (("sends a byte per 50 ms", _send_slowly), ("does not read", _read_nothing)):
        for _ in range(ATTEMPTS):
            delays[name] = _measure_delay(context, start)
            context.close_connections()
            if delays[name] <= MAX_DELAY:
                break
        else:
            seen = f"others were delayed by {1e3 * delays[name]:.0f} ms by a client that {name}"
            raise Failure(seen, ONE_BLOCKS_OTHERS)
    return f"others were delayed by at most {1e3 * max(delays.values()):.0f} ms"


def _measure_delay(context: Context, start: Callable[[Context], Callable[[], None]]) -> float:
    """Return by how many seconds a slow client delays others, once the server has processed what it has sent."""
    usual = max(context.measure(ONE_BLOCKS_OTHERS) for _ in range(PROBES))
    disturb = start(context)
    for _ in range(ROUNDS):
        delay = max(0.0, _measure_beside(context, disturb) - usual)
        if delay <= MAX_DELAY:
            break
    return delay


def _measure_beside(context: Context, disturb: Callable[[], None]) -> float:
    times = []
    for _ in range(PROBES):
        context.wait(lambda: False, BYTE_INTERVAL)
        disturb()
        times.append(context.measure(ONE_BLOCKS_OTHERS, disturb, BYTE_INTERVAL))
    return median(times)


def _send_slowly(context: Context) -> Callable[[], None]:
    slow, text = context.open(), cycle(SLOW_TEXT)
    return lambda: slow.send(bytes([next(text)]))


def _read_nothing(context: Context) -> Callable[[], None]:
    _send_unread(context, FLOOD_SIZE)
    return lambda: None


def _send_unread(context: Context, size: int) -> tuple[Connection, bytes]:
    """Send messages of ``size`` bytes in all on a connection until it is full, and receive nothing."""
    largest = context.largest
    data = make_lines(size, min(LINE_SIZE, largest)) if context.mode.keeps_open else make_text(largest)
    connection = context.open(is_small=True)
    connection.is_reading = False
    connection.send(data)
    left = len(data) + 1
    while len(connection.unsent) < left:
        left = len(connection.unsent)
        context.wait(lambda: False, STALL_TIME)
    return connection, data


def check_backpressure(context: Context) -> str:
    """Send without reading, then read.

    Once, both directions may stay full: Linux can lose a change of the window. It tries again after intervals that
    double as long as the path is full, so the next one takes at most as long as that was.
    """
    for _ in range(STALL_ATTEMPTS):
        started = monotonic()
        connection, data = _send_unread(context, BACKLOG_SIZE)
        left = len(connection.unsent)
        connection.resume()
        if context.wait_for_reply(connection, data.count(b"\n"), min_timeout=2 * (monotonic() - started)):
            break
    context.compare(connection, data, NOT_ALL_REPLIES)
    waited = f"the server waited after {len(data) - left:,}" if left else "the path accepted all of them"
    return f"{len(data):,} bytes, read after they were sent; {waited}"
