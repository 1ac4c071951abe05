"""Sources of batches whose items arrive in the event loop."""

import asyncio
from collections.abc import AsyncIterable, Callable, Iterator
from typing import TypeVar

from .batching import WINDOW_BYTES, Batch, Message, Source, take_batch

T = TypeVar("T", bound=str | bytes)


class AsyncSource(Source[T]):
    """Items of an asynchronous iterable. A task takes them, and pauses while ``max_waiting`` of them are waiting."""

    _task: asyncio.Task[None]

    def __init__(self, items: AsyncIterable[T], max_waiting: int) -> None:
        super().__init__()
        self._items = items
        self._max_waiting = max_waiting
        self._size = 0
        self._has_room = asyncio.Event()
        self._is_stopped = False

    def start(self, notify: Callable[[], object]) -> None:
        self._task = asyncio.create_task(self._take_all(notify))

    async def stop(self) -> None:
        self._is_stopped = True
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _take_all(self, notify: Callable[[], object]) -> None:
        failure: BaseException | None = None
        try:
            async for item in self._items:
                if self._is_stopped:  # and the cancellation was suppressed, as by asyncio.wait_for in Python 3.11
                    return
                self.waiting.append(item)
                self._size += len(item)
                notify()
                if len(self.waiting) >= self._max_waiting or self._size >= WINDOW_BYTES:
                    self._has_room.clear()
                    await self._has_room.wait()
        except BaseException as error:
            failure = error
            if not isinstance(error, Exception):  # canceled
                raise
        finally:
            if not self.is_done:
                self.is_done, self.failure = True, failure
                notify()

    def _pop(self) -> T:
        item = self.waiting.popleft()
        self._size -= len(item)
        self._has_room.set()
        return item


class AsyncMessages(AsyncSource[Message]):
    def take(self, count: int) -> Batch | None:
        batch, _, failure = take_batch(self._pop_all(), count)
        if failure is not None:
            self.waiting.clear()
            self.is_done, self.failure = True, failure
            self._task.cancel()
        return batch

    def _pop_all(self) -> Iterator[Message]:
        while self.waiting:
            yield self._pop()
