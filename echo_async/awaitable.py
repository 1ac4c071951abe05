"""Resources that can be opened with ``await`` or with ``async with``, and coroutines that block instead of waiting."""

from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar, cast


class Closeable(Protocol):
    def close(self) -> None: ...
    async def wait_closed(self) -> None: ...


T = TypeVar("T", bound=Closeable)
R = TypeVar("R")


def run(coroutine: Coroutine[Any, Any, R]) -> R:
    """Return the result of a coroutine in which everything blocks."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast(R, end.value)
    raise RuntimeError("the coroutine waits for an event loop")


class AwaitableContextManager(Generic[T]):
    """The result of ``connect`` and ``serve``: ``await`` opens it, ``async with`` opens and closes it."""

    _resource: T

    def __init__(self, open: Callable[[], Coroutine[Any, Any, T]], name: str) -> None:
        self._open = open
        self._usage = f"write 'async with {name}(...)' or 'await {name}(...)'"

    if not TYPE_CHECKING:  # type checkers report these mistakes by themselves

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"{name!r} is an attribute of what is opened; {self._usage}")

        def __enter__(self) -> NoReturn:
            raise TypeError(f"cannot be used with a plain 'with'; {self._usage}")

        def __exit__(self, *exception: object) -> None: ...

    def __await__(self) -> Generator[Any, None, T]:
        return self._open().__await__()

    async def __aenter__(self) -> T:
        self._resource = await self._open()
        return self._resource

    async def __aexit__(self, *exception: object) -> None:
        self._resource.close()
        await self._resource.wait_closed()
