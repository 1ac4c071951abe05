"""The resolver, called by an event loop: it blocks, so it runs in a thread."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def run_resolver(resolve: Callable[[], T]) -> T:
    """Return ``resolve()``. :exc:`OSError` if no thread can be started.

    The thread is a new one: unlike a thread of the event loop's executor, it does not delay closing the loop.
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

    _start_thread(run)
    return await asyncio.wrap_future(resolved)


def _start_thread(run: Callable[[], None]) -> None:
    """Start a daemon thread; one that is none in a subinterpreter, which from Python 3.12 on has no daemon threads."""
    failure: RuntimeError | None = None
    for is_daemon in (True, False):
        try:
            return threading.Thread(target=run, name="echo-async resolver", daemon=is_daemon).start()
        except RuntimeError as error:
            failure = error
    raise OSError(f"cannot resolve the host name: {failure}; use an address") from failure
