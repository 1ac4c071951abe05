"""Signals: graceful shutdown and certificate reload of the server, Ctrl-C in the client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine
from time import monotonic
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import StartError
from ..logs import log
from ..server.systemd import notify
from .output import Output

if TYPE_CHECKING:
    from ..server.server import BaseServer

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECOND_INTERRUPT_DELAY = 1.0  # seconds for an orderly end, in which a further Ctrl-C is ignored


class ServerSignals:
    """The signals of the server: the first stop signal drains it, the next one aborts it, SIGHUP reloads certificates.

    Created in the running event loop, before the server is started.
    """

    def __init__(self) -> None:
        self._server: BaseServer | None = None
        self._stop_requests = 0
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._stop, number)

    def attach(self, server: BaseServer) -> None:
        """Apply the signals to ``server``. It is closed if one arrived before."""
        self._server = server
        if server.config.ssl_certfile is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        if self._stop_requests:
            server.close()

    def ignore(self) -> None:
        """Ignore stop signals, so that none ends the process before it has finished."""
        self.restore()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Restore the default handlers; uvloop does not do this when it is closed."""
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        self._stop_requests += 1
        is_first = self._stop_requests == 1
        event = "shutting down" if is_first else "aborting connections"
        log.info("%s received: %s", signal.Signals(number).name, event)
        notify("STOPPING=1")
        if self._server is not None:
            self._server.close() if is_first else self._server.abort()

    def _reload(self) -> None:
        assert self._server is not None
        try:
            self._server.reload_certificates()
            log.info("SIGHUP received: certificates reloaded")
        except StartError as error:
            log.error("SIGHUP received: reload failed, keeping the previous certificates: %s", error)


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

    def __enter__(self) -> ClientInterrupt:
        with contextlib.suppress(ValueError):  # not in the main thread: signals are handled elsewhere
            self._previous_handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            signal.signal(signal.SIGINT, self._previous_handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._output.interrupt()  # raises if a write to stdout blocks the event loop
        if self._interrupted_at is None:
            self._interrupted_at = monotonic()
            if self._task is None:
                raise KeyboardInterrupt
            self._task.cancel()
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._task.get_loop().call_soon_threadsafe(lambda: None)  # wakes the event loop
        elif monotonic() - self._interrupted_at > SECOND_INTERRUPT_DELAY:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
