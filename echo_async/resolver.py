"""Functions that block, such as the resolver, called by an event loop: each call runs in a thread of its own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from .background import start_thread

T = TypeVar("T")


async def run_in_thread(function: Callable[[], T], name: str) -> T:
    """Return ``function()``. :exc:`RuntimeError` if no thread can be started.

    Unlike a thread of the event loop's executor, this one delays neither closing the loop nor the exit.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    start_thread(run, name)
    return await asyncio.wrap_future(future)


async def run_resolver(resolve: Callable[[], T]) -> T:
    """Return ``resolve()``. :exc:`OSError` if no thread can be started."""
    try:
        return await run_in_thread(resolve, "echo-async resolver")
    except RuntimeError as error:
        raise OSError(f"cannot resolve the host name: {error}; use an address") from error
