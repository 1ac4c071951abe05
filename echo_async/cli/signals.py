"""Ctrl-C in the command: the work is cancelled, in order, wherever it is; nothing is ever torn out of the event loop.

asyncio's own way raises ``KeyboardInterrupt`` out of whatever runs at a second Ctrl-C, and an event
loop that is torn like that shows tracebacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, TypeVar

from .output import Output

__all__ = ["Interrupts"]

T = TypeVar("T")

SECOND_INTERRUPT_DELAY = 1.0  # seconds for an end in order; who interrupts again later wants it at once


class Interrupts:
    """``with Interrupts(output) as interrupts: runner.run(interrupts.cancel(main))``"""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._task: asyncio.Task[Any] | None = None
        self._first: float | None = None

    async def cancel(self, main: Coroutine[Any, Any, T]) -> T:
        """Run ``main``, cancelled by the first interrupt."""
        self._task = asyncio.current_task()
        return await main

    def __enter__(self) -> Interrupts:
        with contextlib.suppress(ValueError):  # not in the main thread: then Ctrl-C is not ours to look at
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._output.interrupt()  # raises, if the loop would never hear of it
        if self._first is None:
            self._first = monotonic()
            if self._task is None:
                raise KeyboardInterrupt
            self._task.cancel()
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._task.get_loop().call_soon_threadsafe(lambda: None)  # wakes it
        elif monotonic() - self._first > SECOND_INTERRUPT_DELAY:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
