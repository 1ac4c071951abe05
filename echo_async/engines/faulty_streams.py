"""Connections of the ``streams`` engine with a fault: the coroutine runs the actions between two reads."""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from ..server.handshake_acceptor import OnEstablished
from ..server.origin import Origin
from ..server.registry import Registry
from ..wire.faults import Action, End, FaultPlan, ReportFault, Send, Wait
from .connection import TimeoutKind
from .faulty_connection import FaultyConnection
from .loop_internals import reset_transport, shutdown_write
from .streams import CHUNKS_PER_TURN, DRAIN_THRESHOLD, Reader, StreamConnection
from .streams import create_protocol as create_healthy_protocol


def create_protocol(registry: Registry, on_established: OnEstablished, origin: Origin) -> asyncio.Protocol:
    assert origin.plan is not None
    return create_healthy_protocol(registry, on_established, origin, partial(FaultyStreamConnection, origin.plan))


class FaultyStreamConnection(FaultyConnection, StreamConnection):
    """One connection with a fault."""

    def __init__(
        self,
        plan: FaultPlan,
        registry: Registry,
        origin: Origin,
        reader: Reader,
        writer: asyncio.StreamWriter,
    ) -> None:
        super().__init__(registry, origin, reader, writer)
        self._plan = plan
        self._steps = 0
        self._waiter: asyncio.Future[None] | None = None  # done when the wait or the stall is over
        self._is_ending = self._is_stalled = self.has_pending_reply = False

    async def _echo(self) -> None:
        conversation, size = self.conversation, self.context.config.chunk_size
        try:
            await self._run_actions(self._plan.start())
            while not self._is_stopping and not (conversation.finished and not self.is_held_open):
                self._is_reading = True
                chunk = await self._reader.read(size)
                self._is_reading = False
                if not chunk:
                    return conversation.receive_eof()
                if self.context.log_chunks:
                    self.log_chunk(chunk)
                await self._send(conversation.receive(chunk))
                await self._count_step()
        except asyncio.CancelledError:
            if self.has_pending_reply or self._is_reading or self._task.uncancel():  # not canceled by _wake alone
                raise
        finally:
            self._is_reading = False

    async def _send(self, reply: bytes) -> None:
        await self._run_actions(self.actions(reply))

    async def _run_actions(self, actions: Iterator[Action]) -> None:
        self.has_pending_reply = True
        due = self.context.now()
        while not self._transport.is_closing():
            match next(actions, None):
                case None:
                    break
                case Send() as action:
                    self._transport.write(action.data)
                    await self._count_step()
                    if self.unsent() > DRAIN_THRESHOLD:
                        await self._writer.drain()
                case Wait() as action:
                    due = await self._wait(due, action.seconds)
                case ReportFault() as action:
                    self.report(action)
                case End() as action:
                    await self._apply_end(action)
        self.has_pending_reply = False

    async def _count_step(self) -> None:
        """Give other connections their turn after a number of chunks and replies."""
        self._steps += 1
        if self._steps % CHUNKS_PER_TURN == 0:
            await asyncio.sleep(0)

    async def _wait(self, due: float, seconds: float) -> float:
        """Wait for ``seconds`` from ``due`` on, or until the server stops; return when it should have ended."""
        due = self.next_due(due, seconds)
        seconds = max(0.0, due - self.context.now())
        if not seconds:
            await asyncio.sleep(0)
        else:
            timer = asyncio.get_running_loop().call_later(seconds, self._resume_actions)
            try:
                await self._wait_until_resumed()  # which an abort ends as well
            finally:
                timer.cancel()
        if not self._transport.is_closing() and self.is_tls_closed():
            self.abort()
        return due

    async def _wait_until_resumed(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _resume_actions(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end_waits(self) -> None:
        """End this wait, and shorten all others."""
        self._is_ending = True
        self._resume_actions()

    async def _apply_end(self, end: End) -> None:
        match end:
            case End.CLOSE:
                self.conversation.finish()
            case End.RESET:
                reset_transport(self._transport)
                raise ConnectionResetError("reset by a fault")
            case End.HALF_CLOSE:
                shutdown_write(self._transport)
            case End.STALL:
                await self._stall()

    async def _stall(self) -> None:
        transport = cast(asyncio.Transport, self._transport)
        self.begin_stall()
        transport.pause_reading()
        if not self._is_ending:
            await self._wait_until_resumed()
        self._is_stalled = False
        self.conversation.finish()
        if not transport.is_closing():
            transport.resume_reading()

    def expired_timeout(self, now: float) -> TimeoutKind | None:
        if self._transport.is_closing():  # the connection is lost: wait no longer
            self._end_waits()
        return super().expired_timeout(now)

    def finish(self) -> None:
        self._end_waits()
        super().finish()

    def stop(self) -> None:
        self._end_waits()
        super().stop()

    def abort(self) -> None:
        self._end_waits()
        super().abort()

    def get_extra_info(self, name: str) -> Any:
        return self._transport.get_extra_info(name)

    def raw_socket(self) -> object:
        return self._transport.get_extra_info("socket")
