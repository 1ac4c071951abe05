"""Runs the actions of a script in a coroutine, for both asyncio engines."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

from ..wire.script import Script, Timer, Wait
from .connection import Connection
from .runner import Runner

SENDS_PER_TURN = 50  # before other connections get their turn


class AsyncioRunner(Runner):
    """Runs actions on a transport; ``wait_writable`` waits until its write buffer has room."""

    def __init__(
        self,
        connection: Connection,
        script: Script,
        transport: asyncio.Transport,
        wait_writable: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(connection, script)
        self._transport = transport
        self._wait_writable = wait_writable
        self._wake = asyncio.Event()  # ends the current wait
        self._timer: asyncio.TimerHandle | None = None
        self._sends = 0

    async def _send(self, data: bytes) -> None:
        self._transport.write(data)
        await self._wait_writable()
        self._sends += 1
        if self._sends % SENDS_PER_TURN == 0:
            await asyncio.sleep(0)

    async def sleep(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        is_woken = self._wake.is_set()
        self._wake.clear()
        return is_woken

    def _is_lost(self) -> bool:
        return self._transport.is_closing()

    def _start_timer(self, timer: Timer) -> None:
        self._timer = asyncio.get_running_loop().call_later(timer.seconds, self._expire, timer)

    def _begin_stall(self) -> None:
        super()._begin_stall()
        self._transport.pause_reading()

    def _half_close(self) -> None:
        self._transport.write_eof()

    _close_write = _half_close

    def wake(self) -> None:
        self._wake.set()

    def end(self) -> None:
        self.is_ending = True
        if self._timer is not None:
            self._timer.cancel()
        self.wake()
        if self.is_stalled:
            self.is_stalled = False
            if not self._transport.is_closing():
                self._transport.resume_reading()


async def log_in_turns(lines: Iterator[Wait], connection: Connection) -> None:
    """Log the messages of one reply, in turns with other connections; the rest at once if canceled or aborted."""
    try:
        for _ in lines:
            if not connection.is_aborted:
                await asyncio.sleep(0)
    finally:
        for _ in lines:
            pass
