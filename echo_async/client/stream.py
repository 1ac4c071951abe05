"""Many messages in a bounded window: pipelined if the server keeps connections open, one at a time otherwise; no IO."""

from collections import deque
from collections.abc import AsyncGenerator, Callable
from time import perf_counter
from typing import Any, Protocol

from ..errors import ReplyError
from .batching import Batch, Result, Source, Window
from .session import Session


class Event(Protocol):
    """The part of :class:`asyncio.Event` that a stream waits with."""

    def set(self) -> object: ...
    def clear(self) -> object: ...
    async def wait(self) -> object: ...


async def send_batches(
    session: Session[Any], source: Source[Any], window: int, changed: Event
) -> AsyncGenerator[Result, None]:
    """Send the batches of ``source`` and yield their results in order.

    A failed reply is a result too. The messages in flight after it are sent again on a new connection.
    At the end, the failure of the source is raised, if it has one. ``changed`` is set when replies have arrived.
    """
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
                    await _send(session, in_flight, batch, changed.set)
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


async def _send(session: Session[Any], in_flight: Window, batch: Batch, notify: Callable[[], object]) -> None:
    connection = session.pipelined_connection() if in_flight.batches else None
    in_flight.add(batch)
    batch.notify = notify
    try:
        connection = connection or await session.connect()
    except ReplyError as error:
        batch.error = error
        notify()
    else:
        batch.sent_at = perf_counter()
        connection.send(batch)


async def _exchange(session: Session[Any], batch: Batch) -> Result:
    """Send a batch of one message, with no other in flight."""
    started = perf_counter()
    try:
        seconds = await session.exchange(batch.data)
    except ReplyError as error:
        return Result(batch, 0, 0, perf_counter() - started, error)
    return Result(batch, 0, len(batch.data), seconds, None)
