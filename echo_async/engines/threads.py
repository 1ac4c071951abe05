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

__all__ = ["ThreadConnection"]

DISCARD = 64 * 1024  # bytes asked for at each read whose input is discarded


class ThreadConnection(Connection):
    """One client of the ``threads`` engine.

    ``_busy`` is held while a chunk is answered, so that whoever stops the server never ends the sending
    side in the middle of a reply. Nobody waits for it but the thread itself: who finds it taken leaves a
    mark (``_stopping``, ``_finishing``), and the thread looks for marks when it has let go.
    """

    __slots__ = ("_busy", "_finishing", "_shut", "_socket", "_stopping", "_unsent")

    def __init__(self, registry: Registry, client: socket.socket, peername: object) -> None:
        super().__init__(registry)
        self._socket = client
        self._peername = peername
        self._busy = threading.Lock()
        self._stopping = False
        self._finishing = False
        self._shut = False  # our sending side is ended
        self._unsent = 0

    def run(self) -> None:
        """Serve the client until the connection is closed. For a thread of its own."""
        try:
            self._echo()
        except OSError as error:
            log.debug("%s broke off: %s", self.peer, error)
        except Exception as error:
            self.registry.count("failed")
            log.error("%s closed for an error of the server's: %r", self.peer, error)
        finally:
            self._socket.close()
            self.registry.remove(self)

    def _echo(self) -> None:
        """Read a chunk, answer what it completed; until the client ends its side. Then close."""
        conversation, receive, size = self.conversation, self._socket.recv, self.registry.config.chunk_size
        log_chunks = self.registry.log_chunks
        while chunk := receive(size):
            if log_chunks:
                self.log_chunk(chunk)
            with self._busy:
                reply = conversation.receive(chunk)
                if reply:
                    self._send(reply)
                if conversation.finished:
                    size = DISCARD
                    self._end_sending()
            if self._stopping or self._finishing:
                self._heed()
        conversation.receive_eof()

    def _send(self, reply: bytes) -> None:
        """Like ``sendall``, but it can be seen from outside whether it gets on."""
        self._unsent = len(reply)
        sent = self._socket.send(reply)
        self._unsent -= sent
        if self._unsent:
            rest = memoryview(reply)[sent:]
            while rest:
                rest = rest[self._socket.send(rest) :]
                self._unsent = len(rest)
        if self.registry.log_messages:
            self.log_replies(reply)

    def _end_sending(self) -> None:
        if not self._shut:
            self._shut = True
            self._socket.shutdown(socket.SHUT_WR)

    def _heed(self) -> None:
        """Do what the marks say, unless the thread is busy: then it will see them."""
        if self._busy.acquire(blocking=False):
            try:
                if self._finishing:
                    self.conversation.finish()
                elif not self._has_input():
                    self.conversation.stop()
                if self.conversation.finished:
                    self._end_sending()
            except OSError:
                self.abort()
            finally:
                self._busy.release()

    def _has_input(self) -> bool:
        """Whether the client has sent something that waits to be read."""
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False

    def unsent(self) -> int:
        return self._unsent

    def finish(self) -> None:
        self._finishing = True
        self._heed()

    def stop(self) -> None:
        self._stopping = True
        self._heed()

    def abort(self) -> None:
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)
