"""One idea: a thing that takes time to open can be awaited, or entered with ``async with``."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["AwaitableContextManager"]


class Closeable(Protocol):
    def close(self) -> None: ...
    async def wait_closed(self) -> None: ...


T = TypeVar("T", bound=Closeable)


class AwaitableContextManager(Generic[T]):
    """``await opening`` gives the open thing; ``async with opening`` closes it at the end as well."""

    def __init__(self, open: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._open = open
        self._opened: T | None = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._open().__await__()

    async def __aenter__(self) -> T:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._opened is not None
        self._opened.close()
        await self._opened.wait_closed()
