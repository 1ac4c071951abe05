"""Many messages in a bounded window: pipelined where the server allows it, one by one where it does not.

Messages travel in batches: joined into one write, compared as one run of bytes. So what a message
costs is what it takes to hand it in and out. A source gives batches, :func:`flow` sends them and
gives back what came of them, in order; :func:`stream` is that for the messages of a library user.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator
from contextlib import aclosing
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from ..errors import MessageError, ReplyError
from ..messages import encode
from ..verifier import Exchange
from .connection import Connection

__all__ = ["WINDOW", "WINDOW_BYTES", "Batch", "Result", "Source", "flow", "stream"]

WINDOW = 1024  # messages on their way at a time
WINDOW_BYTES = 262_144  # ... and bytes; one message more may go over it
BATCH_BYTES = 65_536  # bytes of one write; one message more may go over it

M = TypeVar("M", str, bytes)
Message = str | bytes


class Batch(Exchange):
    """Messages that are sent in one write. ``delivered`` bytes of it were given back to the user."""

    __slots__ = ("count", "delivered", "notify", "sent")

    def __init__(self, data: bytes, count: int = 1) -> None:
        super().__init__(data)
        self.count = count
        self.delivered = 0
        self.sent = 0.0
        self.notify: Callable[[], None] | None = None

    def progress(self) -> None:
        if self.notify is not None:
            self.notify()

    def whole(self) -> int:
        """How many bytes of it are back as whole messages, and as they should be."""
        if self.error is not None:
            return self.current_message()[0]
        if self.returned == len(self.data):
            return self.returned
        return self.data.rfind(b"\n", self.delivered, self.returned) + 1 or self.delivered


class Result(NamedTuple):
    """What came of messages: those of ``batch`` from byte ``start`` to ``end`` are back, after ``seconds``.

    With an ``error``, the message that starts at ``end`` is the one that it befell.
    """

    batch: Batch
    start: int
    end: int
    seconds: float
    error: ReplyError | None


class Source(Protocol):
    """Where batches come from. ``ended``: no more will come, because of ``failure`` if there is one."""

    @property
    def ended(self) -> bool: ...
    @property
    def failure(self) -> BaseException | None: ...

    def start(self, notify: Callable[[], None]) -> None:
        """Begin; call ``notify``, in the event loop, when there is more to take or the end is known."""

    async def stop(self) -> None:
        """Nothing will be taken any more: leave nothing running."""

    def take(self, count: int, size: int) -> Batch | None:
        """At most ``count`` messages, of ``size`` bytes and perhaps one message more; None if none is there now."""


class Client(Protocol):
    """What :func:`flow` needs of an ``EchoClient``."""

    @property
    def keeps_open(self) -> bool: ...
    @property
    def pipelines(self) -> bool: ...
    async def exchange(self, data: bytes) -> float: ...
    async def ready(self) -> Connection: ...


class Window:
    """Batches on their way, in order."""

    def __init__(self, count: int) -> None:
        self.batches: deque[Batch] = deque()
        self._count = count
        self._batch = max(1, count // 4)
        self._messages_out = 0
        self._bytes_out = 0

    def room(self) -> int:
        """Messages that may be sent now in one batch."""
        if self._bytes_out >= WINDOW_BYTES:
            return 0
        return min(self._batch, self._count - self._messages_out)

    def add(self, batch: Batch) -> None:
        self.batches.append(batch)
        self._messages_out += batch.count
        self._bytes_out += len(batch.data)

    def pop(self) -> None:
        batch = self.batches.popleft()
        self._messages_out -= batch.count
        self._bytes_out -= len(batch.data)

    def clear(self) -> list[Batch]:
        batches = list(self.batches)
        while self.batches:
            self.pop()
        return batches

    def results(self) -> Iterator[Result]:
        """What came back since the last time, up to what is still on its way, or failed."""
        while self.batches:
            batch = self.batches[0]
            start, batch.delivered = batch.delivered, batch.whole()
            if batch.delivered > start or batch.error is not None:
                yield Result(batch, start, batch.delivered, perf_counter() - batch.sent, batch.error)
            if batch.delivered < len(batch.data) or batch.error is not None:
                return
            self.pop()


async def flow(client: Client, source: Source, window: int = WINDOW) -> AsyncGenerator[Result, None]:
    """Send what ``source`` gives and yield what came of it, in order.

    A message whose reply is lost, late or different is a result too; messages behind it that were on
    their way are sent again on a new connection. It ends with the source: by raising its failure, if any.
    """
    changed = asyncio.Event()
    out = Window(window)
    again: deque[Batch] = deque()

    def take(count: int) -> Batch | None:
        return again.popleft() if again else source.take(count, BATCH_BYTES)

    try:
        source.start(changed.set)
        while True:
            changed.clear()
            for result in out.results():
                yield result
                if result.error is not None:
                    again.extend(_unanswered(out.clear()))
            while client.pipelines or not out.batches:  # else the results of a lost connection come first
                if client.keeps_open:
                    if not (room := out.room()) or (batch := take(room)) is None:
                        break
                    out.add(batch)
                    await _send(client, batch, changed.set)
                elif (batch := take(1)) is not None:
                    yield await _exchange(client, batch)
                else:
                    break
            if not out.batches and not again and source.ended:
                break
            await changed.wait()
    finally:
        await source.stop()
    if source.failure is not None:
        raise source.failure


async def _send(client: Client, batch: Batch, notify: Callable[[], None]) -> None:
    batch.notify = notify
    try:
        connection = await client.ready()
    except ReplyError as error:
        batch.error = error
        notify()
    else:
        batch.sent = perf_counter()
        connection.send(batch)


async def _exchange(client: Client, batch: Batch) -> Result:
    """Send one message with no other on the way."""
    started = perf_counter()
    try:
        seconds = await client.exchange(batch.data)
    except ReplyError as error:
        return Result(batch, 0, 0, perf_counter() - started, error)
    return Result(batch, 0, len(batch.data), seconds, None)


def _unanswered(batches: list[Batch]) -> Iterator[Batch]:
    """What is behind the first message of the first of ``batches`` that is not back: that one has failed."""
    for number, batch in enumerate(batches):
        rest = batch.data if number else batch.data[batch.current_message()[1] :]
        if rest:
            yield Batch(rest, batch.count)


class MessageBatch(Batch):
    """Messages as the user gave them, and so as the user gets them back."""

    __slots__ = ("_given", "_messages")

    def __init__(self, data: bytes, messages: list[Message]) -> None:
        super().__init__(data, len(messages))
        self._messages = messages
        self._given = 0

    def replies(self, start: int, end: int) -> list[Message]:
        if start == 0 and end == len(self.data):
            return self._messages
        given, self._given = self._given, self._given + self.data.count(b"\n", start, end)
        return self._messages[given : self._given]


class Messages:
    """A source that takes from an iterable of messages."""

    def __init__(self, messages: Iterable[Message]) -> None:
        self._iterator = iter(messages)
        self.ended = False
        self.failure: BaseException | None = None

    def start(self, notify: Callable[[], None]) -> None:
        pass

    async def stop(self) -> None:
        pass

    def take(self, count: int, size: int) -> Batch | None:
        if self.ended:
            return None
        batch, self.ended, self.failure = _take(self._iterator, count, size)
        return batch


class _AsyncMessages:
    """A source whose messages come when they come: a task takes them, and waits when there are enough."""

    def __init__(self, messages: AsyncIterable[Message], window: int) -> None:
        self._messages = messages
        self._window = window
        self._taken: deque[Message] = deque()
        self._size = 0
        self._room = asyncio.Event()
        self._done = self._stopped = False
        self.failure: BaseException | None = None

    @property
    def ended(self) -> bool:
        return self._done and not self._taken

    def start(self, notify: Callable[[], None]) -> None:
        self._pump = asyncio.create_task(self._take_all(notify))

    async def stop(self) -> None:
        self._stopped = True
        self._pump.cancel()
        await asyncio.wait([self._pump])

    async def _take_all(self, notify: Callable[[], None]) -> None:
        try:
            async for message in self._messages:
                if self._stopped:  # and the cancellation was swallowed, as asyncio.wait_for can do on 3.11
                    return
                self._taken.append(message)
                self._size += len(message)
                notify()
                if len(self._taken) >= self._window or self._size >= WINDOW_BYTES:
                    self._room.clear()
                    await self._room.wait()
        except Exception as error:
            self._end(error, notify)
        except BaseException as error:  # cancelled, by us or by the user's own code: not an end like any other
            self._end(error, notify)
            raise
        else:
            self._end(None, notify)

    def _end(self, failure: BaseException | None, notify: Callable[[], None]) -> None:
        if not self._done:
            self._done, self.failure = True, failure
            notify()

    def take(self, count: int, size: int) -> Batch | None:
        batch, _, failure = _take(self._drain(), count, size)
        if failure is not None:
            self._taken.clear()
            self._done, self.failure = True, failure
            self._pump.cancel()
        self._room.set()
        return batch

    def _drain(self) -> Iterator[Message]:
        while self._taken:
            message = self._taken.popleft()
            self._size -= len(message)
            yield message


def _take(messages: Iterator[Message], count: int, size: int) -> tuple[Batch | None, bool, BaseException | None]:
    """A batch of what ``messages`` gives; whether that was the last of it; and why, if it is an error."""
    taken: list[Message] = []
    ended, failure = False, None
    try:
        for message in messages:
            taken.append(message)
            size -= len(message)
            if size <= 0 or len(taken) >= count:
                break
        else:
            ended = True
    except Exception as error:
        ended, failure = True, error
    data = _join(taken)
    if data is None:  # something in it is not as it should be, or has its own newline
        lines: list[bytes] = []
        try:
            lines.extend(map(encode, taken))
        except (MessageError, TypeError) as error:
            ended, failure = True, error
        data, taken = b"".join(lines), taken[: len(lines)]
    return (MessageBatch(data, taken) if taken else None), ended, failure


def _join(messages: list[Any]) -> bytes | None:
    """``messages`` as they go over the wire, each with a newline added; None if that cannot be done to all of them."""
    kinds = set(map(type, messages))
    if kinds != {str} and kinds != {bytes}:
        return None if messages else b""
    try:
        data = "\n".join([*messages, ""]).encode() if kinds == {str} else b"\n".join([*messages, b""])
    except UnicodeEncodeError:
        return None
    newlines = len(data) - len(data.replace(b"\n", b""))  # by memchr; bytes.count looks at each byte in turn
    return data if newlines == len(messages) else None


async def stream(client: Client, messages: Iterable[M] | AsyncIterable[M], window: int) -> AsyncGenerator[M, None]:
    """The replies to ``messages``, in order; the first that fails raises its error."""
    source = _AsyncMessages(messages, window) if isinstance(messages, AsyncIterable) else Messages(messages)
    async with aclosing(flow(client, source, window)) as results:
        async for batch, start, end, _, error in results:
            for reply in cast(MessageBatch, batch).replies(start, end):
                yield cast(M, reply)
            if error is not None:
                raise error
