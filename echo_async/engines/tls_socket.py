"""A blocking socket with TLS on it, as far as the ``threads`` engine needs one.

:class:`ssl.SSLSocket` will not do: it takes no flags for ``recv``, and shutting it down from another thread
turns it into a plain socket under the feet of the one that reads. Here TLS is done in memory, and the plain
socket stays what it is.
"""

import contextlib
import socket
import ssl
import time

from ..compat import MSG_DONTWAIT

MAX_RECORD_SIZE = 16 * 1024  # bytes of data that one TLS record takes (RFC 8446 5.1)


class TlsSocket:
    """The methods of :class:`socket.socket` that :class:`~echo_async.engines.threads.ThreadConnection` calls."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext) -> None:
        self.plain = plain
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.session = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._ended = False  # the client has ended its side, as far as it was read

    def handshake(self, seconds: float) -> None:
        """:exc:`OSError` (of which :exc:`ssl.SSLError` is one) if it fails, :exc:`TimeoutError` if it takes longer."""
        deadline = time.monotonic() + seconds
        try:
            while True:
                try:
                    self.session.do_handshake()
                    return
                except ssl.SSLWantReadError:
                    self._flush()
                self.plain.settimeout(max(0.001, deadline - time.monotonic()))
                self._receive_encrypted(0)
        finally:
            self._flush()
            self.plain.settimeout(None)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Decrypted bytes; ``b""`` when the client has ended its side. With ``MSG_PEEK``, whether there may be some.

        As with a plain socket, less than ``size`` means that there was no more.
        """
        if flags & socket.MSG_PEEK:
            return b"?" if self._ended or self.session.pending() else self.plain.recv(1, flags)
        while True:
            try:
                return self._read(size)
            except ssl.SSLWantReadError:
                self._receive_encrypted(flags)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):  # ended by close_notify, or without
                return b""

    def _read(self, size: int) -> bytes:
        data = self.session.read(size)
        while len(data) < size:
            try:
                more = self.session.read(size - len(data))
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError:  # it says so again when it is asked for the next
                more = b""
            if not more:
                self._ended = True
                break
            data += more
        return data

    def send(self, data: bytes | memoryview) -> int:
        """Encrypt and send one record's worth of ``data``; return how much that was."""
        sent = self.session.write(data[:MAX_RECORD_SIZE])
        self._flush()
        return sent

    def shutdown(self, how: int) -> None:
        """With ``SHUT_WR``, say close_notify first; the client can still be heard. Else end at once."""
        if how == socket.SHUT_WR:
            with contextlib.suppress(ssl.SSLError):  # what the client says to it is still to come
                self.session.unwrap()
            # The end of a connection does not wait for its client: what does not fit is dropped.
            with contextlib.suppress(BlockingIOError):
                self.plain.send(self._outgoing.read(), MSG_DONTWAIT)
        self.plain.shutdown(how)

    def close(self) -> None:
        self.plain.close()

    def _receive_encrypted(self, flags: int) -> None:
        data = self.plain.recv(4 * MAX_RECORD_SIZE, flags)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self.plain.sendall(data)
