"""Which event loop runs: a name in, a loop factory for ``asyncio.Runner`` out. No policy is touched.

(Event loop policies are deprecated in Python 3.14; ``asyncio.Runner(loop_factory=...)`` is there from 3.11.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from .errors import StartError
from .logs import RateLimitedLog, log

__all__ = ["LoopName", "log_loop_errors", "loop_factory"]

LoopName = Literal["auto", "asyncio", "uvloop"]


def loop_factory(name: LoopName = "auto") -> Callable[[], asyncio.AbstractEventLoop]:
    """The function that makes a new event loop of that name.

    ``auto`` is uvloop where it is installed, else asyncio's own. :exc:`StartError` if uvloop is asked
    for and is not there.
    """
    if name == "asyncio":
        return asyncio.new_event_loop
    try:
        import uvloop
    except ImportError as error:
        if name == "auto":
            return asyncio.new_event_loop
        raise StartError(
            f"cannot use --loop uvloop: {error}; install it (pip install 'echo-async[uvloop]') or take --loop auto"
        ) from error
    return uvloop.new_event_loop


def log_loop_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Log what goes wrong inside ``loop`` as one line, and at most one a second.

    By itself asyncio logs a traceback each time; for want of descriptors that is one for every place in the
    backlog, every second.
    """
    say = RateLimitedLog(log.error, "%s: %r")
    loop.set_exception_handler(lambda _, context: say(context["message"], context.get("exception")))
