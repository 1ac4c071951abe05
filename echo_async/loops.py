"""Event loops by name, as factories for :class:`asyncio.Runner`. No event loop policy is set."""

import asyncio
from collections.abc import Callable
from typing import Literal

from .errors import StartError
from .logs import RateLimitedLog, log

LoopName = Literal["auto", "asyncio", "uvloop"]


def loop_factory(name: LoopName = "auto") -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the function that creates an event loop; ``auto`` selects uvloop if it is installed.

    Raises:
        StartError: ``name`` is ``uvloop``, and it is not installed.
    """
    if name == "asyncio":
        return asyncio.new_event_loop
    try:
        import uvloop
    except ImportError as error:
        if name == "auto":
            return asyncio.new_event_loop
        raise StartError(
            f"cannot use --loop uvloop: {error}; install it (pip install 'echo-async[uvloop]') or use --loop auto"
        ) from error
    return uvloop.new_event_loop


def log_loop_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Log an error inside ``loop`` as one line, at most once per second.

    By default asyncio logs a traceback for each. Without free descriptors, ``accept`` fails up to ``backlog``
    times per second.
    """
    log_error = RateLimitedLog(log.error, "event loop error: %s: %r")
    loop.set_exception_handler(lambda _, context: log_error(context["message"], context.get("exception")))
