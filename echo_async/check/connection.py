"""The connections of a check: sockets that never block, and one function that waits for all of them."""

import contextlib
import socket
from collections.abc import Callable, Sequence
from selectors import EVENT_READ, EVENT_WRITE
from ssl import SSLError, SSLSocket, SSLWantReadError, SSLWantWriteError
from time import monotonic, sleep

from ..compat import PollSelector, set_reset_on_close
from ..errors import describe_error

READ_SIZE = 65_536  # bytes of one read
SEND_SIZE = 65_536  # bytes of one write; over TLS, it must be complete before its progress shows
MAX_RECORDS = 1000  # TLS records of one read
MAX_WAIT = 60.0  # seconds of one wait
REPLY_FACTOR, REPLY_OVERHEAD = 6, 16_384  # of the largest reply: JSON takes six bytes for a control character

END, RESET, FLOOD = "the end", "a reset", "more than any echo"
"""How a connection ends, as results name it."""


class Connection:
    """One connection. :func:`wait` sends and receives.

    Attributes:
        received: The bytes received since the last :meth:`take`.
        lines: The number of newlines among them.
        unsent: The bytes that the kernel has not accepted yet.
        ending: How the connection ended; empty as long as it is open.
        is_reading: Whether input is received. Without it, the path fills up.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.received = bytearray()
        self.lines = 0
        self.unsent = memoryview(b"")
        self.ending = ""
        self.is_reading = True
        self._ends_input = False
        self._is_reset = False  # a send failed
        self._max_received = REPLY_OVERHEAD

    def send(self, data: bytes, *, ends_input: bool = False) -> None:
        """Send what the kernel accepts now; :func:`wait` sends the rest, and then ends the input of the server."""
        self.unsent = memoryview(bytes(self.unsent) + data)
        self._ends_input = ends_input
        self._max_received += REPLY_FACTOR * len(data) + REPLY_OVERHEAD * (data.count(b"\n") + 1)
        self._flush()

    def take(self) -> bytes:
        data, self.received, self.lines = bytes(self.received), bytearray(), 0
        return data

    def resume(self) -> None:
        """Receive again. TLS may have decrypted input that the socket no longer reports."""
        self.is_reading = True
        self._receive()

    def reset(self) -> None:
        set_reset_on_close(self.socket)
        self.close()

    def close(self) -> None:
        self.ending = self.ending or "closed"
        self.socket.close()

    @property
    def progress(self) -> tuple[int, int]:
        """What changes as bytes are sent and received."""
        return len(self.received), len(self.unsent)

    @property
    def events(self) -> int:
        if self.ending:
            return 0
        return EVENT_READ * self.is_reading | EVENT_WRITE * bool(self.unsent)

    def handle(self, events: int) -> None:
        if events & EVENT_READ and self.is_reading:
            self._receive()
        if events & EVENT_WRITE and not self.ending:
            self._flush()

    def _receive(self) -> None:
        """Receive once; over TLS many records, because some servers send few bytes in each."""
        for _ in range(MAX_RECORDS if isinstance(self.socket, SSLSocket) else 1):
            try:
                data = self.socket.recv(READ_SIZE)
            except (BlockingIOError, SSLWantReadError, SSLWantWriteError):
                return
            except SSLError as error:
                self.ending = f"a TLS error ({describe_error(error)})"
                return
            except OSError:  # a reset, or a broken pipe after one
                self.ending = RESET
                return
            if not data:
                self.ending = RESET if self._is_reset else END
                return
            self.received += data
            self.lines += data.count(b"\n")
            self._max_received -= len(data)
            if self._max_received < 0:
                self.ending = FLOOD
                return

    def _flush(self) -> None:
        try:
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent[:SEND_SIZE]) :]
        except (BlockingIOError, SSLWantReadError, SSLWantWriteError):
            return
        except OSError:  # what the server sent before can still be received
            self.unsent, self._is_reset = memoryview(b""), True
        if self._ends_input:
            with contextlib.suppress(OSError):
                # Of TLS, too, only the TCP connection is ended: SSLSocket.shutdown would stop decrypting.
                socket.socket.shutdown(self.socket, socket.SHUT_WR)


def wait(connections: Sequence[Connection], is_done: Callable[[], object], seconds: float) -> bool:
    """Send and receive on all ``connections`` until ``is_done()``, for at most ``seconds``; return whether it is."""
    deadline = monotonic() + seconds
    while not is_done():
        left = deadline - monotonic()
        with PollSelector() as selector:
            for each in connections:
                if each.events:
                    selector.register(each.socket, each.events, each)
            if selector.get_map():
                for key, events in selector.select(max(0.0, min(left, MAX_WAIT))):
                    key.data.handle(events)
            elif left > 0:  # Windows cannot wait for no socket
                sleep(min(left, MAX_WAIT))
        if left <= 0:
            return bool(is_done())
    return True
