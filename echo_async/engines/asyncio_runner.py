"""Runs the actions of a script in a coroutine, for both asyncio engines."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator

from ..wire.script import Action, End, Report, Script, Send, Timer, Wait
from .connection import Connection
from .runner import Runner

ACTIONS_PER_TURN = 50  # before other connections get their turn
LOST_CHECK_INTERVAL = 1.0  # seconds of a wait between two checks whether the client is gone


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
        self._queue: deque[Iterator[Action]] = deque([script.start()])
        self._wake = asyncio.Event()  # ends the current wait
        self._timer: asyncio.TimerHandle | None = None
        self._steps = 0

    def submit(self, reply: bytes) -> None:
        """Let :meth:`run` do what takes the place of sending ``reply``."""
        self._queue.append(self._actions(reply))

    async def run(self) -> None:
        """Run what was submitted."""
        self.is_busy = True
        self._due = self._context.now()
        try:
            while self._queue and not self.is_cut:
                for action in self._queue.popleft():
                    await self._run(action)
                    if self._transport.is_closing():
                        return
                    if self.is_cut:
                        break
            while self.is_stalled and not self._transport.is_closing():
                await self._sleep(LOST_CHECK_INTERVAL)
        finally:
            self.is_busy = False

    async def _run(self, action: Action) -> None:
        match action:
            case Send():
                self.sent += len(action.data)
                self._transport.write(action.data)
                await self._wait_writable()
            case Wait():
                return await self._wait(action.seconds)
            case Report():
                self._report(action)
            case Timer():
                self._timer = asyncio.get_running_loop().call_later(action.seconds, self._expire, action)
            case End():
                await self._apply_end(action)
        self._steps += 1
        if self._steps % ACTIONS_PER_TURN == 0:
            await asyncio.sleep(0)

    async def _wait(self, seconds: float) -> None:
        """Wait, at most until :meth:`end` is called or the connection is lost."""
        left = self._next_wait(seconds)
        if not left:
            await asyncio.sleep(0)
        while left > 0 and await self._wait_on(left):
            left = self._due - self._context.now()

    async def _wait_on(self, seconds: float) -> bool:
        """Sleep; return whether to wait on."""
        is_woken = await self._sleep(min(seconds, LOST_CHECK_INTERVAL))
        return not (self.is_cut or self._transport.is_closing() or (is_woken and self.is_ending))

    async def _sleep(self, seconds: float) -> bool:
        """Sleep, at most until :meth:`wake` is called; return whether it was."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        is_woken = self._wake.is_set()
        self._wake.clear()
        return is_woken

    async def _apply_end(self, end: End) -> None:
        for wait in self._wait_until_sent(end):
            await self._wait(wait.seconds)
            if self._transport.is_closing() or self.is_cut:
                return
        match end:
            case End.CLOSE:
                self._connection.conversation.end_input()
            case End.RESET:
                self._connection.abort(reset=True)
                raise ConnectionResetError("reset by the script")
            case End.HALF_CLOSE:
                self._half_close()
            case End.STALL:
                await self._stall()

    async def _stall(self) -> None:
        await asyncio.sleep(0)  # uvloop starts reading after connection_made, in which an eager task runs
        if not self._transport.is_closing() and not self.is_ending:
            self._begin_stall()

    def _begin_stall(self) -> None:
        super()._begin_stall()
        self._transport.pause_reading()

    def _half_close(self) -> None:
        self._transport.write_eof()

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
