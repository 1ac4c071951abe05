"""One thread per connection, with blocking reads of ``chunk_size`` bytes: the project's first model, with an end.

A thread that waits for its client is woken through its socket: once the sending side is closed, a well-behaved
client closes its own, which ends the read; shutting down both sides ends it in any case.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from functools import partial
from selectors import EVENT_WRITE
from typing import Any

from ..awaitable import run
from ..background import start_thread
from ..compat import MSG_DONTWAIT, is_ready, set_reset_on_close
from ..wire.script import Script, Timer
from .connection import CHUNKS_PER_TURN, MIN_WRITE, Connection
from .context import ServerContext, Slot
from .runner import Runner
from .tls_socket import TlsSocket

SEND_SIZE = 64 * 1024  # bytes per send, which blocks until the kernel has taken all: small enough to show progress
DISCARD_SIZE = 64 * 1024  # bytes per read of input that is discarded
SEND_CHECK_INTERVAL, SEND_CHECKS = 0.001, 50  # seconds between two checks whether a send is over or waits; how many


class ThreadConnection(Connection):
    """One connection of the ``threads`` engine.

    ``_io_lock`` is held from before a chunk leaves the kernel until it is answered. So a shutdown sees all input
    that is not answered, and never closes the sending side in the middle of a reply. Only the connection's own
    thread waits for the lock: another thread that finds it taken sets a flag, which the owner checks after release.
    """

    # On Python 3.13 and newer, an instance dictionary takes 8 % more instructions per connection.
    __slots__ = (
        "_drain_requested",
        "_io_lock",
        "_is_resetting",
        "_is_write_closed",
        "_linger_requested",
        "_socket",
        "_unsent",
        "ended_by",
    )

    runner: ThreadRunner | None

    def __init__(self, context: ServerContext, slot: Slot, connected: socket.socket | TlsSocket) -> None:
        super().__init__(context, slot)
        self._socket = connected
        self._io_lock = threading.Lock()
        self._drain_requested = False  # by a shutdown or a timeout
        self._linger_requested = False  # by a timeout
        self._is_write_closed = False
        self._is_resetting = False  # nothing is sent but the reset
        self._unsent = 0
        self.ended_by: str | None = None  # "eof" or "reset" of the client, or the "server": what was first
        if slot.make_script is not None:
            self.runner = ThreadRunner(self, slot.make_script(self))

    def run(self) -> None:
        """Serve the connection until it is closed, in a thread of its own."""
        try:
            self._echo()
            if not self._is_write_closed and not self._is_resetting:
                self.end_script()
                self._half_close()  # closing is no end if a child process has a duplicate of the socket
        except OSError as error:
            self.ended_by = self.ended_by or "reset"
            self.log_lost(error)
        except Exception as error:
            self.fail(error)
        finally:
            self._socket.close()
            if self.runner is not None:
                self.runner.close()
            self.context.remove(self)

    def _echo(self) -> None:
        """Answer input until the conversation is finished; then discard it until the client closes its side."""
        conversation = self.conversation
        if self.runner is not None:
            with self._io_lock:
                run(self.runner.run())
            if conversation.finished:
                self._handle_end_request()
        receive = self._socket.recv
        while not conversation.finished:
            if self._answer_input():
                self.ended_by = self.ended_by or "eof"
                return conversation.end_input()
            if self._drain_requested or conversation.finished:
                self._handle_end_request()
            if not conversation.finished:
                receive(1, socket.MSG_PEEK)  # wait
        if self.runner is not None:
            run(self.runner.run())  # the time of the script may have stalled the connection
        with self._io_lock:  # another thread may be closing the sending side, and TLS allows one at a time
            pass
        while chunk := receive(DISCARD_SIZE):
            conversation.receive(chunk)

    def _answer_input(self) -> bool:
        """Read and answer chunks while there may be more. Return True at the end of the input.

        Replies to chunks that arrived together are sent together: a packet for each would take most of the time.
        """
        conversation, receive, size = self.conversation, self._socket.recv, self.context.config.chunk_size
        answer = self.log_and_receive if self.context.log_chunks else conversation.receive
        min_write = MIN_WRITE if self.runner is None else 1
        reply, chunks, is_ended = b"", 0, True
        with self._io_lock:
            try:
                while chunk := receive(size, MSG_DONTWAIT):
                    if part := answer(chunk):
                        reply += part
                    chunks += 1
                    if reply and (len(reply) >= min_write or chunks >= CHUNKS_PER_TURN):
                        self._send(reply)
                        reply, chunks = b"", 0
                    if len(chunk) < size or self._drain_requested or conversation.finished:
                        is_ended = False  # less than requested: there was no more
                        break
            except BlockingIOError:
                is_ended = False
            if reply:
                self._send(reply)
        return is_ended

    def _send(self, reply: bytes) -> None:
        if self.runner is not None:
            self.runner.submit(reply)
            return run(self.runner.run())
        self._send_all(reply)
        if self.context.log_messages:
            for _ in self.log_reply(reply):
                pass  # the operating system schedules threads

    def _send_all(self, reply: bytes) -> None:
        """Like ``sendall``, but its progress shows in ``_unsent``."""
        self._unsent = len(reply)
        if self._unsent <= SEND_SIZE:
            self._unsent -= self._socket.send(reply)
        if self._unsent:
            rest = memoryview(reply)[-self._unsent :]
            while rest and not self._is_resetting:
                rest = rest[self._socket.send(rest[:SEND_SIZE]) :]
                self._unsent = len(rest)

    # What a script of a test calls, in the thread of the connection.

    def receive(self, size: int) -> bytes:
        """Wait for input, and return at most ``size`` bytes of it; none at its end."""
        try:
            data = self._socket.recv(size)
        except TimeoutError:  # of a timeout that a test has set
            raise
        except OSError:
            self.ended_by = self.ended_by or "reset"
            raise
        if data:
            self.conversation.receive(data)
        else:
            self.ended_by = self.ended_by or "eof"
        return data

    def receive_waiting(self) -> bytes:
        """Receive what has arrived, and return the reply to it."""
        reply = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := self._socket.recv(DISCARD_SIZE, MSG_DONTWAIT):
                reply += self.conversation.receive(chunk)
        return reply

    def start_tls(self, context: ssl.SSLContext, seconds: float, received: bytes) -> None:
        """Do the TLS handshake of a server, within ``seconds``, which begins with what was ``received`` before."""
        secured = TlsSocket(self.get_extra_info("socket"), context, self.log_lost)
        try:
            secured.handshake(seconds, received)
        except (ConnectionError, ssl.SSLEOFError) as error:
            self.ended_by = self.ended_by or ("reset" if isinstance(error, ConnectionResetError) else "eof")
            raise
        self._socket = secured

    # The end.

    def _handle_end_request(self) -> None:
        """Close the sending side if nothing is left to answer. The owner of a taken lock does this after release."""
        if self._is_write_closed or (self.is_held_open and not self._drain_requested):
            return
        if not self._io_lock.acquire(blocking=False):
            return
        try:
            if self._linger_requested:
                self.conversation.end_input()
            elif self._drain_requested and not self._has_input():
                self.conversation.drain()
            if self.conversation.finished:
                self._close_write()
        except OSError:  # the client has reset the connection
            self.abort()
        finally:
            self._io_lock.release()

    def _close_write(self) -> None:
        self.ended_by = self.ended_by or "server"
        self._is_write_closed = True
        if not self._is_resetting:
            self._socket.shutdown(socket.SHUT_WR)

    def _half_close(self) -> None:
        """Close the sending side, which another thread may close as well."""
        with contextlib.suppress(OSError), self._io_lock:
            self._close_write()

    def _has_input(self) -> bool:
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | MSG_DONTWAIT))
        except BlockingIOError:
            return False

    def unsent(self) -> int:
        return self._unsent + (self._socket.unsent() if isinstance(self._socket, TlsSocket) else 0)

    def get_extra_info(self, name: str) -> Any:
        if name == "tls":
            return self._socket.tls if isinstance(self._socket, TlsSocket) else None
        plain = self._socket.plain if isinstance(self._socket, TlsSocket) else self._socket
        return {"socket": lambda: plain, "sockname": plain.getsockname, "peername": plain.getpeername}[name]()

    def linger(self) -> None:  # another thread may be in the conversation
        self._linger_requested = True
        self.drain()

    def drain(self) -> None:
        self.end_script()
        self._drain_requested = True
        if self._is_write_closed and not self.conversation.finished:  # half-closed: there is no half left to close
            return self.abort()
        self._handle_end_request()

    def abort(self, *, reset: bool = False) -> None:
        self.ended_by = self.ended_by or "server"
        if self.runner is not None:
            self.runner.is_cut = True
        with contextlib.suppress(OSError, ValueError):  # it is closed already
            if reset:
                return self._reset(self.get_extra_info("socket"))
            self._linger_requested = self._drain_requested = True  # input that is queued is not answered
            self.end_script()
            self._socket.shutdown(socket.SHUT_RDWR)

    def _reset(self, connected: socket.socket) -> None:
        self._is_resetting = True
        set_reset_on_close(connected)
        self.linger()
        connected.shutdown(socket.SHUT_RD)  # wakes its thread, which closes the socket
        for _ in range(SEND_CHECKS):
            if not self._unsent:
                break
            if not is_ready([connected], EVENT_WRITE):  # the client does not see this end, behind what it has not read
                connected.shutdown(socket.SHUT_WR)
                break
            time.sleep(SEND_CHECK_INTERVAL)


class ThreadRunner(Runner):
    """Runs the actions of a script in the thread of its connection: what a coroutine would await blocks."""

    _connection: ThreadConnection

    def __init__(self, connection: ThreadConnection, script: Script) -> None:
        super().__init__(connection, script)
        self._wake = threading.Event()  # ends the current wait
        self._ended = threading.Event()  # ends the timer
        self._timer: threading.Thread | None = None

    async def _send(self, data: bytes) -> None:
        self._connection._send_all(data)

    async def sleep(self, seconds: float) -> bool:
        is_woken = self._wake.wait(seconds)
        self._wake.clear()
        return is_woken

    def _is_lost(self) -> bool:
        return False  # to send raises an error then

    def _start_timer(self, timer: Timer) -> None:
        self._timer = start_thread(partial(self._expire_at, timer), "echo-async timer")

    def _expire_at(self, timer: Timer) -> None:
        if not self._ended.wait(timer.seconds):
            self._expire(timer)

    def _close_write(self) -> None:
        self._connection._close_write()

    def _half_close(self) -> None:
        self.wake()  # the thread of the connection holds its lock during an action
        self._connection._half_close()

    def wake(self) -> None:
        self._wake.set()

    def end(self) -> None:
        self.is_ending = True
        self.is_stalled = False
        self._ended.set()
        self.wake()

    def close(self) -> None:
        """The connection is closed: leave no thread."""
        self.end()
        if self._timer is not None:
            self._timer.join()
