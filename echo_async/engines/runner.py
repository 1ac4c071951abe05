"""Runs the actions of a script, one after another: what a coroutine and a thread have in common.

A connection that has a script gives its replies to a runner instead of its transport. The connection reads nothing
until all actions are done, so a slow script applies backpressure. Waits end when the server stops.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..compat import unsent_in_kernel
from ..wire.script import Action, End, Report, Script, Timer, Wait
from .connection import Connection

SENT_CHECK_INTERVAL = 0.001  # seconds between two checks whether everything is on the wire
MAX_WAIT_AT_END = 0.001  # seconds that an action waits during a shutdown
MIN_WAIT = 0.75  # of the length of a wait, if the previous one took too long


class Runner:
    """The state of a script that runs.

    Attributes:
        sent: Bytes that the actions so far have sent.
        is_busy: Actions are left: replies are delayed.
        is_stalled: Nothing more is read or sent.
        is_ending: The server is about to end the connection.
        is_cut: The actions that are left are not run: the time of the script is up, or the connection is aborted.
    """

    def __init__(self, connection: Connection, script: Script) -> None:
        self.sent = 0
        self.is_busy = False
        self.is_stalled = False
        self.is_ending = False
        self.is_cut = False
        self._connection = connection
        self._context = connection.context
        self._script = script
        self._due = 0.0  # when the last wait ended, or should have ended

    @property
    def is_held_open(self) -> bool:
        """Whether it is left to the client to close the connection."""
        return (self._script.is_silent or self.is_stalled) and not self.is_ending

    def _actions(self, reply: bytes) -> Iterator[Action]:
        """Yield what to do instead of sending ``reply``."""
        if self._context.log_messages and (lines := self._connection.log_reply(reply)) is not None:
            yield from lines
        yield from self._script.reply(reply)

    def _wait_until_sent(self, end: End) -> Iterator[Wait]:
        """Wait until what was sent is on the wire, if ``end`` is a reset, which discards the rest."""
        if not self.sent or end is not End.RESET:
            return
        connection, context = self._connection, self._context
        deadline = context.now() + context.config.timeout_write
        while context.now() < deadline:
            if not connection.unsent() and not unsent_in_kernel(connection.get_extra_info("socket")):
                return
            yield Wait(SENT_CHECK_INTERVAL)

    def _next_wait(self, seconds: float) -> float:
        """Return the seconds of a wait, 0 or more. A wait that took too long shortens the next."""
        now = self._context.now()
        if self.is_ending:
            self._due = now + min(seconds, MAX_WAIT_AT_END)
        else:
            self._due = max(self._due + seconds, now + MIN_WAIT * seconds)
        return max(0.0, self._due - now)

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

    def _half_close(self) -> None:
        """Close the sending side, while the connection may be in use."""
        raise NotImplementedError

    def wake(self) -> None:
        """Let the current action check again what it waits for. Safe to call from any thread that may end it."""
        raise NotImplementedError

    def end(self) -> None:
        """End the waits: the server is about to end the connection."""
        raise NotImplementedError
