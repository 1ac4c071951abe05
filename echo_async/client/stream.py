"""Many messages in a bounded window: pipelined if the server keeps connections open, one at a time otherwise."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator
from contextlib import aclosing
from time import perf_counter
from typing import Protocol, cast

from ..errors import ReplyError
from .asyncio_session import AsyncioSession
from .batching import (
    WINDOW_BYTES,
    WINDOW_MESSAGES,
    Batch,
    M,
    Message,
    MessageBatch,
    Messages,
    Result,
    Window,
    take_batch,
)

Results = AsyncGenerator[Result, None]


class Source(Protocol):
    """Where batches come from. When ``is_exhausted``, ``failure`` is the error that ended it, if any."""

    @property
    def is_exhausted(self) -> bool: ...
    @property
    def failure(self) -> BaseException | None: ...

    def start(self, notify: Callable[[], None]) -> None:
        """Start; call ``notify`` in the event loop when there is more to take, or the source is exhausted."""

    async def stop(self) -> None:
        """Stop everything that the source runs."""

    def take(self, count: int) -> Batch | None:
        """Return the next batch of at most ``count`` messages; None if none is ready."""


async def send_batches(session: AsyncioSession, source: Source, window: int = WINDOW_MESSAGES) -> Results:
    """Send the batches of ``source`` and yield their results in order.

    A failed reply is a result too. The messages in flight after it are sent again on a new connection.
    At the end, the failure of the source is raised, if it has one.
    """
    changed = asyncio.Event()
    in_flight = Window(window)
    resend: deque[Batch] = deque()

    def take(count: int) -> Batch | None:
        return resend.popleft() if resend else source.take(count)

    try:
        source.start(changed.set)
        while True:
            changed.clear()
            for result in in_flight.results():
                yield result
                if result.error is not None:
                    resend.extend(in_flight.clear_failed())
            # After a connection was lost, all its results are yielded before the next one is opened.
            while session.pipelined_connection() is not None or not in_flight.batches:
                if session.keeps_open:
                    if not (capacity := in_flight.capacity()) or (batch := take(capacity)) is None:
                        break
                    in_flight.add(batch)
                    await _send(session, batch, changed.set)
                elif (batch := take(1)) is not None:
                    yield await _exchange(session, batch)
                else:
                    break
            if not in_flight.batches and not resend and source.is_exhausted:
                break
            await changed.wait()
    finally:
        await source.stop()
    if source.failure is not None:
        raise source.failure


async def _send(session: AsyncioSession, batch: Batch, notify: Callable[[], None]) -> None:
    batch.notify = notify
    try:
        connection = await session.connect()
    except ReplyError as error:
        batch.error = error
        notify()
    else:
        batch.sent_at = perf_counter()
        connection.send(batch)


async def _exchange(session: AsyncioSession, batch: Batch) -> Result:
    """Send a batch of one message, with no other in flight."""
    started = perf_counter()
    try:
        seconds = await session.exchange(batch.data)
    except ReplyError as error:
        return Result(batch, 0, 0, perf_counter() - started, error)
    return Result(batch, 0, len(batch.data), seconds, None)


async def stream(
    session: AsyncioSession, messages: Iterable[M] | AsyncIterable[M], window: int
) -> AsyncGenerator[M, None]:
    """Yield the replies to ``messages`` in order; raise the error of the first that fails."""
    source = _AsyncMessages(messages, window) if isinstance(messages, AsyncIterable) else _IterableSource(messages)
    async with aclosing(send_batches(session, source, window)) as results:
        async for batch, start, end, _, error in results:
            for reply in cast(MessageBatch, batch).replies(start, end):
                yield cast(M, reply)
            if error is not None:
                raise error


class _IterableSource(Messages):
    """Messages of an iterable, as a :class:`Source`."""

    def start(self, notify: Callable[[], None]) -> None:
        pass

    async def stop(self) -> None:
        pass


class _AsyncMessages:
    """Messages of an asynchronous iterable: a task takes them, and pauses while enough of them are waiting."""

    _task: asyncio.Task[None]

    def __init__(self, messages: AsyncIterable[Message], window: int) -> None:
        self._messages = messages
        self._window = window
        self._waiting: deque[Message] = deque()
        self._size = 0
        self._has_room = asyncio.Event()
        self._is_done = self._is_stopped = False
        self.failure: BaseException | None = None

    @property
    def is_exhausted(self) -> bool:
        return self._is_done and not self._waiting

    def start(self, notify: Callable[[], None]) -> None:
        self._task = asyncio.create_task(self._take_all(notify))

    async def stop(self) -> None:
        self._is_stopped = True
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _take_all(self, notify: Callable[[], None]) -> None:
        failure: BaseException | None = None
        try:
            async for message in self._messages:
                if self._is_stopped:  # and the cancellation was suppressed, as by asyncio.wait_for in Python 3.11
                    return
                self._waiting.append(message)
                self._size += len(message)
                notify()
                if len(self._waiting) >= self._window or self._size >= WINDOW_BYTES:
                    self._has_room.clear()
                    await self._has_room.wait()
        except BaseException as error:
            failure = error
            if not isinstance(error, Exception):  # canceled
                raise
        finally:
            if not self._is_done:
                self._is_done, self.failure = True, failure
                notify()

    def take(self, count: int) -> Batch | None:
        batch, _, failure = take_batch(self._pop_all(), count)
        if failure is not None:
            self._waiting.clear()
            self._is_done, self.failure = True, failure
            self._task.cancel()
        self._has_room.set()
        return batch

    def _pop_all(self) -> Iterator[Message]:
        while self._waiting:
            message = self._waiting.popleft()
            self._size -= len(message)
            yield message
