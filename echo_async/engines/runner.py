"""Runs the actions of a script, one after another, in a coroutine or a thread.

A connection that has a script gives its replies to a runner instead of its transport. The connection reads nothing
until all actions are done, so a slow script applies backpressure. Waits end when the server stops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ..compat import unsent_in_kernel
from ..wire.script import Action, End, Report, Script, Send, Timer, Wait
from .connection import Connection

SENT_CHECK_INTERVAL = 0.001  # seconds between two checks whether everything is on the wire
LOST_CHECK_INTERVAL = 1.0  # seconds of a wait between two checks whether the client is gone
MAX_WAIT_AT_END = 0.001  # seconds that an action waits during a shutdown
MIN_WAIT = 0.75  # of the length of a wait, if the previous one took too long


class Runner:
    """The state of a script that runs. What its coroutines await blocks instead in a thread."""

    def __init__(self, connection: Connection, script: Script) -> None:
        self.sent = 0  # bytes, by the actions so far
        self.is_busy = False  # actions are left: replies are delayed
        self.is_stalled = False  # nothing more is read or sent
        self.is_ending = False  # the server is about to end the connection
        self.is_cut = False  # no more actions are run: the time of the script is up, or the connection is aborted
        self._connection = connection
        self._context = connection.context
        self._script = script
        self._queue: deque[Iterator[Action]] = deque([script.start()])
        self._due = 0.0  # when the last wait ended, or should have ended

    @property
    def is_held_open(self) -> bool:
        """Whether it is left to the client to close the connection."""
        return (self._script.is_silent or self.is_stalled) and not self.is_ending

    def submit(self, reply: bytes) -> None:
        """Let :meth:`run` do what takes the place of sending ``reply``."""
        self._queue.append(self._actions(reply))

    def _actions(self, reply: bytes) -> Iterator[Action]:
        if self._context.log_messages and (lines := self._connection.log_reply(reply)) is not None:
            yield from lines
        yield from self._script.reply(reply)

    async def run(self) -> None:
        """Run what was submitted, and wait while the script has stalled the connection."""
        self.is_busy = True
        self._due = self._context.now()
        try:
            while self._queue and not self._is_over():
                for action in self._queue.popleft():
                    await self.perform(action)
                    if self._is_over():
                        break
            while self.is_stalled and not self._is_lost():
                await self.sleep(LOST_CHECK_INTERVAL)
        finally:
            self.is_busy = False

    async def perform(self, action: Action) -> None:
        """Do one action."""
        match action:
            case Send():
                self.sent += len(action.data)
                await self._send(action.data)
            case Wait():
                await self._wait(action.seconds)
            case Report():
                self._report(action)
            case Timer():
                self._start_timer(action)
            case End.CLOSE:
                self._connection.conversation.end_input()
            case End.RESET:
                await self._wait_until_sent()
                if not self._is_over():
                    self._connection.abort(reset=True)
                    raise ConnectionResetError("reset by the script")
            case End.HALF_CLOSE:
                self._close_write()
            case End.STALL:
                await self.sleep(0)  # uvloop starts reading after connection_made, in which an eager task runs
                if not self.is_ending and not self._is_over():
                    self._begin_stall()

    def _is_over(self) -> bool:
        return self.is_cut or self._is_lost()

    async def _wait(self, seconds: float) -> None:
        """Wait, at most until :meth:`end` is called or the connection is lost.

        A wait that took too long shortens the next.
        """
        now = self._context.now()
        if self.is_ending:
            self._due = now + min(seconds, MAX_WAIT_AT_END)
        else:
            self._due = max(self._due + seconds, now + MIN_WAIT * seconds)
        left = self._due - now
        while True:
            is_woken = await self.sleep(min(max(left, 0), LOST_CHECK_INTERVAL))
            left = self._due - self._context.now()
            if left <= 0 or self._is_over() or (is_woken and self.is_ending):
                return

    async def _wait_until_sent(self) -> None:
        """Wait until what was sent is on the wire: a reset discards the rest."""
        connection, deadline = self._connection, self._context.now() + self._context.config.timeout_write
        while self.sent and self._context.now() < deadline and not self._is_over():
            if not connection.unsent() and not unsent_in_kernel(connection.get_extra_info("socket")):
                return
            await self._wait(SENT_CHECK_INTERVAL)

    def _report(self, report: Report) -> None:
        self._context.report(self._connection.peer, report)

    def _begin_stall(self) -> None:
        self.is_stalled = True
        self._connection.conversation.end_input()

    def _expire(self, timer: Timer) -> None:
        """The time of the script is up. Cut its actions, and end the connection as it demands."""
        if self.is_ending:
            return
        self.is_cut = True
        for action in timer.then():
            match action:
                case Report():
                    self._report(action)
                case End.CLOSE:
                    self._connection.linger()
                case End.RESET:
                    self._connection.abort(reset=True)
                case End.HALF_CLOSE:
                    self._half_close()
                case End.STALL:
                    self._begin_stall()
        self.wake()

    # Provided by each runner.

    async def _send(self, data: bytes) -> None:
        """Send ``data``, and wait while the client does not read."""
        raise NotImplementedError

    async def sleep(self, seconds: float) -> bool:
        """Sleep, at most until :meth:`wake` is called; return whether it was."""
        raise NotImplementedError

    def _is_lost(self) -> bool:
        """Whether the connection is known to be lost."""
        raise NotImplementedError

    def _start_timer(self, timer: Timer) -> None:
        """Call :meth:`_expire` after the seconds of ``timer``, unless :meth:`end` is called before."""
        raise NotImplementedError

    def _close_write(self) -> None:
        """Close the sending side, as an action."""
        raise NotImplementedError

    def _half_close(self) -> None:
        """Close the sending side, while the connection may be in use."""
        raise NotImplementedError

    def wake(self) -> None:
        """Let the current action check again what it waits for. Safe to call from any thread that may end it."""
        raise NotImplementedError

    def end(self) -> None:
        """End the waits: the server is about to end the connection."""
        raise NotImplementedError
