"""The resolver, which blocks, in a thread."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from .background import call_in_thread

T = TypeVar("T")


def start_resolver(resolve: Callable[[], T]) -> Future[T]:
    """Start ``resolve()``; return its future. :exc:`OSError` if no thread can be started."""
    try:
        return call_in_thread(resolve, "echo-async resolver")
    except RuntimeError as error:
        raise OSError(f"cannot resolve the host name: {error}; use an address") from error
