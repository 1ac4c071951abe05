"""A socket that blocks, with TLS, as far as the ``threads`` engine needs one.

:class:`ssl.SSLSocket` takes no flags for ``recv``, and becomes a plain socket when another thread shuts it down.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Callable

from ..compat import MSG_DONTWAIT
from ..wire.tls_layer import TlsLayer

READ_SIZE = 64 * 1024  # bytes
MAX_UNSENT = 64 * 1024  # bytes that TLS itself sends, such as answers to key updates, above which it waits for room


class TlsSocket:
    """The methods of :class:`socket.socket` that :class:`~echo_async.engines.threads.ThreadConnection` calls.

    ``on_error`` is called if TLS fails after the handshake.
    """

    def __init__(self, plain: socket.socket, context: ssl.SSLContext, on_error: Callable[[Exception], object]) -> None:
        self.plain = plain
        self.tls = TlsLayer(context)
        self._on_error = on_error
        self._plaintext = b""  # empty as soon as everything is read
        self._position = 0  # of what is read next
        self._unsent = b""  # that the kernel had no room for

    def handshake(self, seconds: float, received: bytes = b"") -> None:
        """Do the handshake, which begins with what was ``received`` before.

        :exc:`OSError` (of which :exc:`ssl.SSLError` is one) if it fails, :exc:`TimeoutError` if it takes longer.
        """
        deadline = time.monotonic() + seconds
        while not self.tls.is_established:
            if received:
                self.tls.receive(received)
                received = b""
            else:
                self.plain.settimeout(max(0.001, deadline - time.monotonic()))
                self._receive(0)
            if (error := self.tls.error) is not None:
                with contextlib.suppress(OSError):
                    self.plain.send(self.tls.output())  # an alert
                raise error
            if output := self.tls.output():
                self.plain.sendall(output)
        self.plain.settimeout(None)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Decrypted bytes; ``b""`` when the client has ended its side. With ``MSG_PEEK``, whether there may be some."""
        tls = self.tls
        if flags & socket.MSG_PEEK:
            return b"?" if self._plaintext or tls.has_records or tls.is_ended else self.plain.recv(1, flags)
        while not self._plaintext:
            if tls.error is not None:
                raise ssl.SSLError(*tls.error.args)  # the traceback of the same one would refer to what has it
            if tls.is_ended:
                return b""
            self._plaintext = self._receive(flags)
            if tls.has_news:
                self._send_output()
        start = self._position
        self._position = start + size
        data = self._plaintext[start : self._position]
        if self._position >= len(self._plaintext):
            self._plaintext, self._position = b"", 0
        return data

    def _receive(self, flags: int) -> bytes:
        """Return the plaintext of a turn, for which more is received from the client if no record is left."""
        tls = self.tls
        if tls.has_records:
            return tls.receive()
        if data := self.plain.recv(READ_SIZE, flags):
            return tls.receive(data)
        tls.receive_eof()
        return b""

    def _send_output(self) -> None:
        """Send what TLS itself has to send, as far as the kernel has room."""
        if self.tls.error is not None:
            self._on_error(self.tls.error)
        self._unsent += self.tls.output()
        if self._unsent:
            flags = MSG_DONTWAIT if len(self._unsent) <= MAX_UNSENT else 0
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self.plain.send(self._unsent, flags) :]

    def unsent(self) -> int:
        """Return the bytes that TLS itself has to send."""
        return len(self._unsent)

    def send(self, data: bytes | memoryview) -> int:
        """Encrypt and send all of ``data``; return its size."""
        self.plain.sendall(self._unsent + self.tls.send(data))
        self._unsent = b""
        return len(data)

    def shutdown(self, how: int) -> None:
        """With ``SHUT_WR``, send close_notify first; the client can still be received from. Else end at once."""
        if how == socket.SHUT_WR:
            # The end of a connection does not wait for its client: what does not fit is dropped.
            with contextlib.suppress(BlockingIOError):
                self.plain.send(self._unsent + self.tls.close(), MSG_DONTWAIT)
        self.plain.shutdown(how)

    def close(self) -> None:
        self.plain.close()
