"""Connections of the ``protocol`` engine with a fault: a callback of the event loop continues the actions."""

import asyncio
from collections.abc import Iterator
from itertools import chain
from typing import Any

from ..server.handshake_acceptor import OnEstablished
from ..server.origin import Origin
from ..server.registry import Registry
from ..wire.faults import Action, End, FaultPlan, ReportFault, Send, Wait
from .faulty_connection import FaultyConnection
from .loop_internals import reset_transport, shutdown_write
from .protocol import LARGE_READ, ProtocolConnection

ACTIONS_PER_TURN = 50  # before other connections get their turn


def create_protocol(registry: Registry, on_established: OnEstablished, origin: Origin) -> asyncio.Protocol:
    assert origin.plan is not None
    return FaultyProtocolConnection(origin.plan, registry, on_established, origin)


class FaultyProtocolConnection(FaultyConnection, ProtocolConnection):
    """One connection with a fault."""

    needs_whole_replies = True

    def __init__(self, plan: FaultPlan, registry: Registry, on_established: OnEstablished, origin: Origin) -> None:
        super().__init__(registry, on_established, origin)
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._actions: Iterator[Action] = iter(())
        self._timer: asyncio.Handle | None = None  # continues the actions
        self._due = 0.0  # when the last wait ended, or should have ended
        self._is_ending = self._is_stalled = False
        self.has_pending_reply = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._append_actions(self._plan.start())
        if self._is_stalled:
            self._loop.call_soon(self._pause_stalled)

    def _pause_stalled(self) -> None:
        """Read no more: uvloop starts reading after ``connection_made``, whatever that does."""
        if self._is_stalled:
            self._transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        if self._is_stalled:  # read before the pause
            return
        try:
            if self.context.log_chunks:
                self.log_chunk(data)
            reply = self.conversation.receive(data)
            self._append_actions(self.actions(reply))
            if len(data) > LARGE_READ:
                self._count_large_read(reply)
        except Exception as error:
            self.fail(error)

    def _append_actions(self, actions: Iterator[Action]) -> None:
        self._actions = chain(self._actions, actions)
        if not self.has_pending_reply:
            self.has_pending_reply = True
            self._due = self.context.now()
            self._run_actions()

    def _run_actions(self) -> None:
        """Run actions until one takes time, or ends them."""
        self._timer = None
        try:
            for _ in range(ACTIONS_PER_TURN):
                if self._transport.is_closing():
                    return
                match next(self._actions, None):
                    case None:
                        return self._finish_actions()
                    case Send() as action:
                        self._transport.write(action.data)
                        if self._is_writing_paused:
                            return
                    case Wait() as action:
                        return self._wait(action.seconds)
                    case ReportFault() as action:
                        self.report(action)
                    case End() as action:
                        self._apply_end(action)
            self._wait(0)
        except OSError as error:  # the client has reset the connection
            self.log_lost(error)
            self.abort()
        except Exception as error:
            self.fail(error)

    def _wait(self, seconds: float) -> None:
        self._transport.pause_reading()
        self._due = self.next_due(self._due, seconds)
        seconds, run = self._due - self.context.now(), self._run_after_wait
        self._timer = self._loop.call_later(seconds, run) if seconds > 0 else self._loop.call_soon(run)

    def _run_after_wait(self) -> None:
        if self._transport.is_closing() or not self.is_tls_closed():
            self._run_actions()
        else:
            self.abort()

    def _apply_end(self, end: End) -> None:
        match end:
            case End.CLOSE:
                self.conversation.finish()
            case End.RESET:
                reset_transport(self._transport)
            case End.HALF_CLOSE:
                shutdown_write(self._transport)
            case End.STALL:
                self.begin_stall()
                self._transport.pause_reading()

    def _finish_actions(self) -> None:
        """All actions are done: read on, or finish."""
        self.has_pending_reply = False
        if self._transport.is_closing() or self._is_stalled or self._lingering_since is not None:
            return
        if self.conversation.finished and not self.is_held_open:
            self.finish()
        else:
            self._resume_reading()

    def _can_read(self) -> bool:
        return not self.has_pending_reply and not self._is_stalled and super()._can_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.has_pending_reply and self._timer is None:
            self._run_actions()

    def connection_lost(self, error: Exception | None) -> None:
        self._cancel_actions()
        super().connection_lost(error)

    def _cancel_actions(self) -> None:
        self._actions = iter(())
        self._is_stalled = self.has_pending_reply = False
        if self._timer is not None:
            self._timer.cancel()

    def finish(self) -> None:
        self._is_ending = True
        self._cancel_actions()
        super().finish()
        self._resume_reading()

    def stop(self) -> None:
        self._is_ending = True
        if self._is_stalled:
            return self.finish()
        if self._timer is not None:
            self._timer.cancel()
            self._run_after_wait()
        super().stop()

    def get_extra_info(self, name: str) -> Any:
        return self._transport.get_extra_info(name)

    def raw_socket(self) -> object:
        return self._transport.get_extra_info("socket")
