"""The resolver, called by an event loop: it blocks, so it runs in a thread."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from .background import start_thread

T = TypeVar("T")


async def run_resolver(resolve: Callable[[], T]) -> T:
    """Return ``resolve()``. :exc:`OSError` if no thread can be started.

    The thread is a new one: unlike a thread of the event loop's executor, it delays neither closing the loop nor the
    exit.
    """
    resolved: Future[T] = Future()
    resolved.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = resolve()
        except Exception as error:
            resolved.set_exception(error)
        else:
            resolved.set_result(result)

    try:
        start_thread(run, "echo-async resolver")
    except RuntimeError as error:
        raise OSError(f"cannot resolve the host name: {error}; use an address") from error
    return await asyncio.wrap_future(resolved)
