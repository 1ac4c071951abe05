"""Ctrl-C in the client."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Coroutine, Iterator
from time import monotonic
from types import FrameType
from typing import Any, TypeVar

from .output import Output

T = TypeVar("T")

SECOND_INTERRUPT_DELAY = 1.0  # seconds for an orderly end, in which a further Ctrl-C is ignored


class ClientInterrupt:
    """Ctrl-C in the client: cancels the main task. A second one, at least a second later, ends the process.

    :class:`asyncio.Runner` raises ``KeyboardInterrupt`` inside the event loop at a second Ctrl-C, which prints
    tracebacks.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._task: asyncio.Task[Any] | None = None
        self._interrupted_at: float | None = None

    async def cancel_on_interrupt(self, main: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        return await main

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGINT in this block, if it runs in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous_handler = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            # After a Ctrl-C the process is about to exit, and KeyboardInterrupt would print a traceback.
            signal.signal(signal.SIGINT, previous_handler if self._interrupted_at is None else signal.SIG_DFL)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._output.interrupt()  # raises if a write to stdout blocks the event loop
        if self._interrupted_at is None:
            self._interrupted_at = monotonic()
            if self._task is None:
                raise KeyboardInterrupt
            # Not here: a callback that is about to complete what the task waits for would find it canceled.
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._task.get_loop().call_soon_threadsafe(self._task.cancel)
        elif monotonic() - self._interrupted_at > SECOND_INTERRUPT_DELAY:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
