"""A thread a client, with blocking reads of ``chunk_size`` bytes: the project's first model, but one that ends.

A thread that waits for its client is never killed: it is woken by what is done to its socket. Ending the
sending side makes a client that is well close its own, which the thread sees; shutting down both sides
wakes it in any case.
"""

from __future__ import annotations

import contextlib
import socket
import threading

from ..logs import log
from .connection import Connection
from .registry import Registry
from .tls_socket import TlsSocket

__all__ = ["ThreadConnection"]

SEND_SIZE = 64 * 1024  # bytes of one send, which comes back when the kernel has taken all: so it shows that it gets on
DISCARD_SIZE = 64 * 1024  # bytes asked for at each read whose input is discarded


class ThreadConnection(Connection):
    """One client of the ``threads`` engine.

    ``_io_lock`` is held from before a chunk leaves the kernel until it is answered. So whoever stops the server
    sees all that was received and not answered, and never ends the sending side in the middle of a reply.
    Nobody waits for it but the thread itself: who finds it taken leaves a mark, and the thread looks for
    marks when it has let go.
    """

    __slots__ = ("_finish_requested", "_io_lock", "_is_write_closed", "_socket", "_stop_requested", "_unsent")

    def __init__(self, registry: Registry, client: socket.socket | TlsSocket, peername: object) -> None:
        super().__init__(registry, peername)
        self._socket = client
        self._io_lock = threading.Lock()
        self._stop_requested = False  # the server stops, or this client's time is up
        self._finish_requested = False  # the latter
        self._is_write_closed = False  # our sending side is ended
        self._unsent = 0

    def run(self) -> None:
        """Serve the client until the connection is closed. For a thread of its own."""
        try:
            self._echo()
        except OSError as error:
            log.debug("%s broke off: %s", self.peer, error)
        except Exception as error:
            self.fail(error)
        finally:
            self._socket.close()
            self.registry.remove(self)

    def _echo(self) -> None:
        """Answer what arrives, until the client ends its side. Then close."""
        conversation, receive = self.conversation, self._socket.recv
        while not conversation.finished:
            if self._answer_input():
                return conversation.receive_eof()
            if self._stop_requested or conversation.finished:
                self._handle_stop_request()
            if not conversation.finished:
                receive(1, socket.MSG_PEEK)  # wait
        with self._io_lock:  # another thread may be about to end our side, and TLS takes one at a time
            pass
        while chunk := receive(DISCARD_SIZE):
            conversation.receive(chunk)

    def _answer_input(self) -> bool:
        """Read chunks, answer what they complete, as long as there may be more. True at the client's end."""
        conversation, receive, size = self.conversation, self._socket.recv, self.registry.config.chunk_size
        answer = self._answer_and_log if self.registry.log_chunks else conversation.receive
        with self._io_lock:
            try:
                while chunk := receive(size, socket.MSG_DONTWAIT):
                    if reply := answer(chunk):
                        self._send(reply)
                    if len(chunk) < size or self._stop_requested or conversation.finished:
                        return False  # less than was asked for: there was no more
            except BlockingIOError:
                return False
        return True

    def _answer_and_log(self, chunk: bytes) -> bytes:
        self.log_chunk(chunk)
        return self.conversation.receive(chunk)

    def _send(self, reply: bytes) -> None:
        """Like ``sendall``, but it can be seen from outside whether it gets on."""
        self._unsent = len(reply)
        if self._unsent <= SEND_SIZE:
            self._unsent -= self._socket.send(reply)
        if self._unsent:
            rest = memoryview(reply)[-self._unsent :]
            while rest:
                rest = rest[self._socket.send(rest[:SEND_SIZE]) :]
                self._unsent = len(rest)
        if self.registry.log_messages:
            for _ in self.log_reply(reply):
                pass  # threads take turns by themselves

    def _handle_stop_request(self) -> None:
        """Do what is due at the end, unless the thread is busy: then it does so itself when it has let go."""
        if self._is_write_closed or not self._io_lock.acquire(blocking=False):
            return
        try:
            if self._finish_requested:
                self.conversation.finish()
            elif self._stop_requested and not self._has_input():
                self.conversation.stop()
            if self.conversation.finished:
                self._is_write_closed = True
                self._socket.shutdown(socket.SHUT_WR)
        except OSError:  # the client reset the connection
            self.abort()
        finally:
            self._io_lock.release()

    def _has_input(self) -> bool:
        """Whether the client has sent something that waits to be read."""
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False

    def unsent(self) -> int:
        return self._unsent

    def finish(self) -> None:
        self._finish_requested = self._stop_requested = True
        self._handle_stop_request()

    def stop(self) -> None:
        self._stop_requested = True
        self._handle_stop_request()

    def abort(self) -> None:
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)
