"""The resolver, called by an event loop: it blocks, so it runs in a thread."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from .background import call_in_thread

T = TypeVar("T")


async def run_resolver(resolve: Callable[[], T]) -> T:
    """Return ``resolve()``. :exc:`OSError` if no thread can be started."""
    try:
        return await asyncio.wrap_future(call_in_thread(resolve, "echo-async resolver"))
    except RuntimeError as error:
        raise OSError(f"cannot resolve the host name: {error}; use an address") from error
