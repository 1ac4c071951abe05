"""TLS without IO, the same for all engines: bytes from the socket in and plaintext out, and the reverse.

OpenSSL reads on until it has data, however many other records it has to process for it: a client that sends nothing
but key updates would keep it busy. So it gets one record at a time. This bounds the work of a turn, and finds
connections whose records have no data.
"""

from __future__ import annotations

import contextlib
import ssl
import struct

from .client_hello import MAX_SIZE as MAX_HELLO_SIZE
from .client_hello import find_server_name

RECORDS_PER_TURN = 64  # before other connections get their turn
MAX_HANDSHAKE_RECORDS = 32  # some ten are enough for the longest chain of certificates that OpenSSL accepts
MAX_RECORDS_WITHOUT_DATA = 16  # in a row, after the handshake (Go: crypto/tls, maxUselessRecords)
MAX_DATA_SIZE = 16 * 1024  # bytes of data in a record (RFC 8446 section 5.1)

HEADER = struct.Struct("!BBxH")  # type, major version, size
RECORD_TYPES, APPLICATION_DATA, MAJOR_VERSION = frozenset(range(20, 24)), 23, 3
MAX_SIZE = MAX_DATA_SIZE + 2048  # bytes of a record after its header (RFC 5246 section 6.2.3)


class TlsLayer:
    """The server's side of one TLS connection.

    Both directions end independently of each other, as TLS 1.3 has it (RFC 8446 section 6.1): what came before the
    client's close_notify is answered after it. Clients of TLS 1.2 get the same.
    """

    __slots__ = (
        "_data",
        "_handshake",
        "_incoming",
        "_is_closed",
        "_outgoing",
        "_without_data",
        "error",
        "has_input",
        "has_news",
        "has_records",
        "is_ended",
        "is_established",
        "server_name",
        "session",
    )

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.session = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.is_established = False  # the handshake is complete
        self.is_ended = False  # nothing more is received: the client has ended its side, or the connection has failed
        self.error: Exception | None = None  # why it has failed: mostly an SSLError
        self.server_name: str | None = None  # that the client asked for (SNI, RFC 6066 section 3), escaped
        self.has_input = False  # the client has sent something
        self.has_records = False  # complete ones are left for the next turn
        self.has_news = False  # one of these has changed with the last :meth:`receive`, or there may be output
        self._handshake = bytearray()  # the beginning of what the client has sent, until the handshake is complete
        self._data: bytes | memoryview = b""  # that is not processed yet
        self._without_data = 0  # records in a row
        self._is_closed = False

    @property
    def unprocessed(self) -> int:
        """The bytes that wait for the next turn."""
        return len(self._data) if self.has_records else 0

    def receive(self, data: bytes = b"") -> bytes:
        """Take ``data`` from the socket; return the plaintext of a turn's records, of it and of what was left before.

        A turn ends after ``RECORDS_PER_TURN``, with the handshake, and with a record that has no data.
        """
        self.has_news = False
        if self.is_ended:
            return b""
        if self.is_established and not self._data and len(data) > HEADER.size:
            kind, _, size = HEADER.unpack_from(data)
            if kind == APPLICATION_DATA and size == len(data) - HEADER.size:
                return self._process(data)  # the usual case: one record
        self.has_input = True
        if data and self._data:
            data = b"".join((self._data, data))
        parts: list[bytes] = []
        view = memoryview(data or self._data)
        start, end = 0, _end_of_record(view, 0)
        while end and len(parts) < RECORDS_PER_TURN:
            plaintext = self._process(view[start:end])
            parts.append(plaintext)
            start, end = end, _end_of_record(view, end)
            if not plaintext and (self.is_established or self.is_ended):
                break
        self.has_records = end > 0 and not self.is_ended
        if self.has_records:
            self.has_news = True
            self._data = view[start:]  # not a copy in every turn
        else:
            self._data = b"" if self.is_ended or start == len(view) else bytes(view[start:])
        return b"".join(parts)

    def _process(self, record: bytes | memoryview) -> bytes:
        self._incoming.write(record)
        try:
            if self.is_established:
                if data := self.session.read(len(record)):
                    self._without_data = 0
                    return data
                self.is_ended = True  # by close_notify
            else:
                if len(self._handshake) < MAX_HELLO_SIZE:
                    self._handshake += record[HEADER.size :]
                    self.server_name = find_server_name(self._handshake)
                self.session.do_handshake()
                self.is_established = True
                self._without_data = 0
                del self._handshake
        except ssl.SSLWantReadError:
            self._count_without_data()
        except ssl.SSLZeroReturnError as error:
            self.is_ended = True
            if not self.is_established:
                self._fail(error)
        except ssl.SSLError as error:
            self._fail(error)
        self.has_news = True
        return b""

    def _count_without_data(self) -> None:
        self._without_data += 1
        if self._without_data > (MAX_RECORDS_WITHOUT_DATA if self.is_established else MAX_HANDSHAKE_RECORDS):
            self._fail(ssl.SSLError(ssl.SSL_ERROR_SSL, f"{self._without_data} records in a row without data"))

    def _fail(self, error: Exception) -> None:
        self.error = error.with_traceback(None)  # which refers to this object
        self.is_ended = True

    def receive_eof(self) -> None:
        """Note that the socket receives nothing more. Without a close_notify this is the end as well."""
        if not self.has_input:
            self._fail(ConnectionError("closed by the peer"))
        elif not self.is_established and not self.is_ended:
            self._incoming.write_eof()
            try:
                self.session.do_handshake()
            except ssl.SSLError as error:
                self._fail(error)
        self.is_ended = True

    def send(self, data: bytes | bytearray | memoryview) -> bytes:
        """Return what to write to the socket in order to send ``data``; nothing once the connection has failed."""
        try:
            if len(data) <= MAX_DATA_SIZE:
                self.session.write(data)
                return self._outgoing.read()
            parts, view = [], memoryview(data)
            for start in range(0, len(data), MAX_DATA_SIZE):
                self.session.write(view[start : start + MAX_DATA_SIZE])
                parts.append(self._outgoing.read())  # one by one: what is written to a MemoryBIO enlarges it for good
            return b"".join(parts)
        except ssl.SSLError:
            return b""

    def output(self) -> bytes:
        """Return what else to write to the socket: handshake messages, answers to key updates, alerts."""
        data = self._outgoing.read()
        return b"" if self._is_closed else data

    def close(self) -> bytes:
        """End the sending side; return what to write to the socket, with a close_notify at the end."""
        with contextlib.suppress(ssl.SSLError):  # that of the client is still to come
            self.session.unwrap()
        data = self.output()
        self._is_closed = True
        return data


def _end_of_record(data: memoryview, position: int) -> int:
    """Return where the record at ``position`` ends, 0 if it is incomplete. All that is left, if that is no record."""
    if len(data) - position < HEADER.size:
        return 0
    kind, version, size = HEADER.unpack_from(data, position)
    end: int = position + HEADER.size + size
    if kind not in RECORD_TYPES or version != MAJOR_VERSION or size > MAX_SIZE:
        return len(data)
    return end if end <= len(data) else 0
