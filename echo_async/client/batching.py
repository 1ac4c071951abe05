"""Messages as bytes, batches of messages, and the window of batches in flight; without IO.

A batch is joined into one write and verified as one run of bytes. So the cost of a message in a stream
is little more than the cost of taking it from its source and returning its reply.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from time import monotonic, perf_counter
from typing import Any, Generic, NamedTuple, TypeVar

from ..errors import ConfigError, MessageError, ReplyError
from .verifier import Exchange

WINDOW_MESSAGES = 1024  # messages in flight
WINDOW_BYTES = 262_144  # bytes in flight; the last message may exceed it
IMMEDIATE = 0.005  # seconds within which taking messages counts as not waiting
BATCH_BYTES = 65_536  # bytes of one write; the last message may exceed it

Message = str | bytes
M = TypeVar("M", str, bytes)
T = TypeVar("T")


def encode(message: Message) -> bytes:
    """Encode ``message`` as UTF-8, with a newline at its end."""
    if isinstance(message, str):
        try:
            data = message.encode()
        except UnicodeEncodeError as error:
            raise MessageError(f"cannot send the message: not valid Unicode ({error}); send bytes") from error
    elif isinstance(message, bytes):
        data = message
    else:
        raise TypeError(f"message must be str or bytes, not {type(message).__name__}")
    newline = data.find(b"\n")
    if newline < 0:
        return data + b"\n"
    if newline < len(data) - 1:
        raise MessageError(f"cannot send the message: newline at byte {newline}; send each line as a message")
    return data


def check_stream(messages: object, window: int) -> None:
    if isinstance(messages, str | bytes):
        raise TypeError(f"messages must be an iterable of messages, not {type(messages).__name__}; use echo() for one")
    if not isinstance(window, int) or window < 1:
        raise ConfigError(f"invalid window: {window} (must be an integer greater than 0)")


class Batch(Exchange):
    """Messages sent in one write. ``delivered`` bytes of their replies were returned to the caller.

    With ``messages``, replies are returned in the type and form of these.
    """

    __slots__ = ("_messages", "_returned", "count", "delivered", "sent_at")

    def __init__(self, data: bytes, messages: Sequence[Message] = ()) -> None:
        super().__init__(data)
        self._messages = messages
        self._returned = 0
        self.count = len(messages) or 1
        self.delivered = 0
        self.sent_at = 0.0

    def verified_bytes(self) -> int:
        """Return the size in bytes of the complete replies that match."""
        if self.error is not None:
            return self.pending_message()[0]
        if self.received == len(self.data):
            return self.received
        return self.data.rfind(b"\n", self.delivered, self.received) + 1 or self.delivered

    def replies(self, start: int, end: int) -> Sequence[Message]:
        """Return the messages whose replies are the bytes from ``start`` to ``end`` of ``data``."""
        if start == 0 and end == len(self.data):
            return self._messages
        returned, self._returned = self._returned, self._returned + self.data.count(b"\n", start, end)
        return self._messages[returned : self._returned]


class Result(NamedTuple):
    """The replies to a batch from byte ``start`` to ``end``, received ``seconds`` after sending.

    An ``error`` is that of the message that starts at ``end``.
    """

    batch: Batch
    start: int
    end: int
    seconds: float
    error: ReplyError | None


class Window:
    """Batches in flight, in order."""

    def __init__(self, max_messages: int) -> None:
        self.batches: deque[Batch] = deque()
        self._max_messages = max_messages
        self._max_batch = max(1, max_messages // 4)
        self._messages = 0
        self._bytes = 0

    def capacity(self) -> int:
        """Return the number of messages that the next batch may have."""
        if self._bytes >= WINDOW_BYTES:
            return 0
        return min(self._max_batch, self._max_messages - self._messages)

    def add(self, batch: Batch) -> None:
        self.batches.append(batch)
        self._messages += batch.count
        self._bytes += len(batch.data)

    def _pop(self) -> Batch:
        batch = self.batches.popleft()
        self._messages -= batch.count
        self._bytes -= len(batch.data)
        return batch

    def results(self) -> Iterator[Result]:
        """Yield what was received since the last call, up to the first incomplete or failed reply."""
        while self.batches:
            batch = self.batches[0]
            start, batch.delivered = batch.delivered, batch.verified_bytes()
            if batch.delivered > start or batch.error is not None:
                yield Result(batch, start, batch.delivered, perf_counter() - batch.sent_at, batch.error)
            if batch.delivered < len(batch.data) or batch.error is not None:
                return
            self._pop()

    def clear_failed(self) -> Iterator[Batch]:
        """Empty the window, and yield the messages after the one that failed, for sending them again."""
        end = self.batches[0].pending_message()[1]
        while self.batches:
            batch = self._pop()
            if rest := batch.data[end:]:
                yield Batch(rest)
            end = 0


class Source(Generic[T]):
    """Where batches come from. When it ``is_exhausted``, ``failure`` is the error that ended it, if any.

    The items of a source that runs in the background are ``waiting`` until they are taken.
    """

    def __init__(self) -> None:
        self.waiting: deque[T] = deque()
        self.is_done = False
        self.failure: BaseException | None = None

    @property
    def is_exhausted(self) -> bool:
        return self.is_done and not self.waiting

    def start(self, notify: Callable[[], object]) -> None:
        """Start; call ``notify`` in the event loop when there is more to take, or the source is exhausted."""

    async def stop(self) -> None:
        """Stop everything that the source runs."""

    def take(self, count: int) -> Batch | None:
        """Return the next batch of at most ``count`` messages; None if none is ready."""
        raise NotImplementedError


class Messages(Source[Message]):
    """The messages of an iterable, more at a time as long as it does not block."""

    def __init__(self, messages: Iterable[Message]) -> None:
        super().__init__()
        self._iterator = iter(messages)
        self._batch_size = 1

    def take(self, count: int) -> Batch | None:
        if self.is_done:
            return None
        started = monotonic()
        batch, self.is_done, self.failure = take_batch(self._iterator, min(count, self._batch_size))
        if monotonic() - started > IMMEDIATE:
            self._batch_size = 1
        elif count > 1:
            self._batch_size = min(2 * self._batch_size, WINDOW_MESSAGES)
        return batch


def take_batch(messages: Iterator[Message], count: int) -> tuple[Batch | None, bool, BaseException | None]:
    """Return a batch of ``messages``, whether they are exhausted, and the error that ended them, if any."""
    size = 0
    taken: list[Message] = []
    is_exhausted, failure = False, None
    try:
        for message in islice(messages, count):
            taken.append(message)
            size += len(message)
            if size >= BATCH_BYTES:
                break
        else:
            is_exhausted = len(taken) < count
    except Exception as error:
        is_exhausted, failure = True, error
    data = _join(taken)
    if data is None:
        lines: list[bytes] = []
        try:
            lines.extend(map(encode, taken))
        except (MessageError, TypeError) as error:
            is_exhausted, failure = True, error
        data, taken = b"".join(lines), taken[: len(lines)]
    return (Batch(data, taken) if taken else None), is_exhausted, failure


def _join(messages: list[Any]) -> bytes | None:
    """Join ``messages``, each with a newline added; None if they need ``encode`` one by one."""
    kinds = set(map(type, messages))
    if kinds != {str} and kinds != {bytes}:
        return None if messages else b""
    try:
        data = "\n".join([*messages, ""]).encode() if kinds == {str} else b"\n".join([*messages, b""])
    except UnicodeEncodeError:
        return None
    newlines = len(data) - len(data.replace(b"\n", b""))  # uses memchr; bytes.count inspects every byte
    return data if newlines == len(messages) else None
