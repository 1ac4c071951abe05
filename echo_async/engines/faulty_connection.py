"""The part of a connection with a fault that does not depend on its engine.

A connection in ``identify`` mode is one as well, with a plan without faults: its replies are made one at a time.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ..compat import is_closed_by_peer, unsent_in_kernel
from ..wire.faults import Action, End, FaultPlan, ReportFault, Wait
from .connection import Connection, TimeoutKind

SENT_CHECK_INTERVAL = 0.001  # seconds between two checks whether everything is on the wire
MAX_WAIT_AT_END = 0.001  # seconds that an action waits during a shutdown
MIN_WAIT = 0.75  # of the length of a wait, if the previous one took too long


class FaultyConnection(Connection):
    """A connection that runs the actions of a plan where another one sends a reply.

    An engine's class runs them one after the other. It reads nothing before all of them are done, so a slow plan
    applies backpressure. Waits end when the server stops.
    """

    __slots__ = ()  # an engine's connection class has a layout of its own

    _plan: FaultPlan
    _is_stalled: bool  # nothing more is read or sent
    _is_ending: bool  # the server is about to end the connection

    @property
    def answered(self) -> int:
        return self._plan.sent

    @property
    def is_held_open(self) -> bool:  # type: ignore[override]  # a constant for other connections
        return self._plan.is_silent and not self._is_ending

    def expired_timeout(self, now: float) -> TimeoutKind | None:
        if self._is_stalled:
            return "idle" if now - self._idle_since >= self.context.config.timeout_idle else None
        return super().expired_timeout(now)

    def is_still_idle(self, now: float) -> bool:
        return False

    def is_new(self, now: float) -> bool:
        return not self._is_stalled and super().is_new(now)

    def actions(self, reply: bytes) -> Iterator[Action]:
        """Yield what to do instead of sending ``reply``."""
        if self._plan.make_reply is None and self.context.config.mode == "identify":
            self._plan.make_reply = self._make_describer()
        if self.context.log_messages and reply:
            for _ in self.log_reply(reply):
                yield Wait(0)
        for action in self._plan.reply(reply):
            if self._plan.sent and action in (End.RESET, End.HALF_CLOSE):
                yield from self._wait_until_sent()
            yield action

    def _wait_until_sent(self) -> Iterator[Wait]:
        """Wait until what was sent is on the wire: a reset discards the rest.

        What is buffered between TLS and its socket reaches the kernel before the second check.
        """
        deadline = self.context.now() + self.context.config.timeout_write
        checks = 2
        while checks and self.context.now() < deadline:
            is_sent = not self.unsent() and not unsent_in_kernel(self.raw_socket())
            checks = checks - 1 if is_sent else 2
            yield Wait(SENT_CHECK_INTERVAL)

    def _make_describer(self) -> Callable[[bytes, int], bytes]:
        from ..server.description import describe_connection  # only for identify mode

        return describe_connection(self.context.config, self._peername, self._header, self.get_extra_info).describe

    def get_extra_info(self, name: str) -> Any:
        """Return ``sockname``, ``peername`` or ``ssl_object``. Provided by the engine."""
        raise NotImplementedError

    def raw_socket(self) -> object:
        """Return the socket of the connection, beneath TLS. Provided by the engine."""
        raise NotImplementedError

    def next_due(self, due: float, seconds: float) -> float:
        """Return when a wait ends that follows one until ``due``. A wait that took too long shortens the next."""
        now = self.context.now()
        if self._is_ending:
            return now + min(seconds, MAX_WAIT_AT_END)
        return max(due + seconds, now + MIN_WAIT * seconds)

    def is_tls_closed(self) -> bool:
        """Whether a TLS client is gone. No transport sends anything then, and none tells while reading is paused."""
        return self.get_extra_info("ssl_object") is not None and is_closed_by_peer(self.raw_socket())

    def report(self, fault: ReportFault) -> None:
        """Count and log a fault that takes effect."""
        self.context.report_fault(self.peer, fault)

    def begin_stall(self) -> None:
        self._is_stalled = True  # type: ignore[misc]  # an attribute of the engine's class
        self._idle_since = self.context.now()
