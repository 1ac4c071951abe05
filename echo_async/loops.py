"""Event loops by name, as factories for :class:`asyncio.Runner`. No event loop policy is set."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Literal

from .errors import StartError
from .logs import LOG_INTERVAL, RateLimitedLog, log
from .wire.text import escape

LoopName = Literal["auto", "asyncio", "uvloop"]
LoopFactory = Callable[[], asyncio.AbstractEventLoop]

LOOP_CHOICES = ("auto", "asyncio", "uvloop", "MODULE:FACTORY")
MAX_NAME = 200  # characters of the name of an object in a log line

LOOP_PATTERN = r"\w+(\.\w+)*:\w+"  # the form of the last choice


def loop_factory(name: str = "auto") -> LoopFactory:
    """Return the function that creates an event loop; ``auto`` selects uvloop if it is installed.

    ``MODULE:FACTORY`` is imported and called once. :exc:`~echo_async.StartError` if that gives no event loop.
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
def logged_errors(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Log errors that nothing handles during this block, each kind at most once per second and as one line.

    By default asyncio logs a traceback for each error inside ``loop``. Without free descriptors, ``accept`` fails up
    to ``backlog`` times per second. Python itself prints a traceback for an error in a thread, and for one in a
    callback that cannot raise it, such as a destructor. What caused these may be chosen by a client.
    """
    hooks = sys.unraisablehook, threading.excepthook
    with (
        _limited_log(loop, "event loop error: %s: %s") as log_loop_error,
        _limited_log(loop, "unhandled error: in %s: %s") as log_error,
    ):
        loop.set_exception_handler(lambda _, context: log_loop_error(context["message"], context.get("exception")))
        sys.unraisablehook = lambda args: log_error(f"{args.object!r:.{MAX_NAME}}", args.exc_value)
        threading.excepthook = lambda args: log_error(f"thread {args.thread and args.thread.name}", args.exc_value)
        try:
            yield
        finally:
            sys.unraisablehook, threading.excepthook = hooks


@contextlib.contextmanager
def _limited_log(loop: asyncio.AbstractEventLoop, template: str) -> Iterator[Callable[[str, object], None]]:
    """Provide a function that logs a text and an error, in any thread. All are accounted for when the block ends."""
    limited = RateLimitedLog(log.error, template)

    def log_error(text: str, error: object) -> None:
        if not isinstance(error, SystemExit):
            limited(*(each if each.isprintable() else escape(each) for each in (text, repr(error))))
        if limited.pending == 1:  # the first since the last line
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: loop.call_later(LOG_INTERVAL, limited.write_pending))

    try:
        yield log_error
    finally:
        limited.write_pending(at_once=True)
