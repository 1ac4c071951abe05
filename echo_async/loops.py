"""Event loops by name, as factories for :class:`asyncio.Runner`. No event loop policy is set."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Literal

from .errors import StartError
from .logs import LOG_INTERVAL, RateLimitedLog, log

LoopName = Literal["auto", "asyncio", "uvloop"]
LoopFactory = Callable[[], asyncio.AbstractEventLoop]

LOOP_CHOICES = ("auto", "asyncio", "uvloop", "MODULE:FACTORY")
LOOP_PATTERN = r"\w+(\.\w+)*:\w+"  # the form of the last choice


def loop_factory(name: str = "auto") -> LoopFactory:
    """Return the function that creates an event loop; ``auto`` selects uvloop if it is installed.

    ``MODULE:FACTORY`` is imported and called once, so that an unusable one is found before the start.

    Raises:
        StartError: ``name`` is ``uvloop``, and it is not installed; or ``MODULE:FACTORY`` creates no event loop.
    """
    if name == "asyncio":
        return asyncio.new_event_loop
    if name not in ("auto", "uvloop"):
        return _import_factory(name)
    try:
        import uvloop
    except ImportError as error:
        if name == "auto":
            return asyncio.new_event_loop
        raise StartError(
            f"cannot use --loop uvloop: {error}; install it (pip install 'echo-async[uvloop]') or use --loop auto"
        ) from error
    return uvloop.new_event_loop


def _import_factory(name: str) -> LoopFactory:
    module, _, attribute = name.partition(":")
    try:
        factory: LoopFactory = getattr(import_module(module), attribute)
        loop = factory()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StartError(f"cannot use --loop {name}: {reason}; install the module or use --loop auto") from error
    if not isinstance(loop, asyncio.AbstractEventLoop):
        raise StartError(f"cannot use --loop {name}: it returned {loop!r}, not an event loop; use --loop auto")
    loop.close()
    return factory


@contextlib.contextmanager
def logged_loop_errors(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Log an error inside ``loop`` during this block as one line, at most once per second.

    By default asyncio logs a traceback for each. Without free descriptors, ``accept`` fails up to ``backlog``
    times per second.
    """
    limited = RateLimitedLog(log.error, "event loop error: %s: %r")

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        limited(context["message"], context.get("exception"))
        if limited.pending == 1:  # the first since the last line
            loop.call_later(LOG_INTERVAL, limited.write_pending)

    loop.set_exception_handler(handle)
    try:
        yield
    finally:
        limited.write_pending(at_once=True)
