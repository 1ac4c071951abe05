"""Resources that can be opened with ``await`` or with ``async with``."""

from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, Protocol, TypeVar


class Closeable(Protocol):
    def close(self) -> None: ...
    async def wait_closed(self) -> None: ...


T = TypeVar("T", bound=Closeable)


class AwaitableContextManager(Generic[T]):
    """The result of ``connect`` and ``serve``: ``await`` opens it, ``async with`` opens and closes it."""

    _resource: T

    def __init__(self, open: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._open = open

    def __await__(self) -> Generator[Any, None, T]:
        return self._open().__await__()

    async def __aenter__(self) -> T:
        self._resource = await self._open()
        return self._resource

    async def __aexit__(self, *exception: object) -> None:
        self._resource.close()
        await self._resource.wait_closed()
