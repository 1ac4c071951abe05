"""A TLS client in memory, which can send any record at any time, also those that the ssl module never sends."""

from __future__ import annotations

import hashlib
import hmac
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HANDSHAKE, APPLICATION_DATA = 22, 23  # types of records
KEY_UPDATE = b"\x18\x00\x00\x01"  # then whether the other side has to update its keys as well
CLIENT_HELLO = b"\x01\x00\x00\x2b\x03\x03" + bytes(32) + b"\x00\x00\x02\xc0\x2b\x01\x00\x00\x00"
V1_2, V1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


def make_context(authority: trustme.CA, version: ssl.TLSVersion, key_log: Path) -> ssl.SSLContext:
    """Return the context of a client whose secrets a :class:`RecordWriter` knows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
    context.keylog_filename = str(key_log)
    return context


class TlsClient:
    """The client's side of one connection: bytes from the server go to :meth:`receive`, others return what to send."""

    def __init__(
        self, context: ssl.SSLContext, server_name: str = "localhost", session: ssl.SSLSession | None = None
    ) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name, session=session)
        self.received = b""  # as it came from the server
        self.is_established = False
        self.is_ended = False  # the server has sent its close_notify

    def hello(self) -> bytes:
        """Return the ClientHello."""
        return self.receive(b"")[1]

    def receive(self, data: bytes) -> tuple[bytes, bytes]:
        """Take what came from the server; return the plaintext in it, and what is to be sent."""
        self.received += data
        self._incoming.write(data)
        plaintext = b""
        with suppress(ssl.SSLWantReadError):
            if not self.is_established:
                self.tls.do_handshake()
                self.is_established = True
            try:
                while part := self.tls.read(65536):
                    plaintext += part
                self.is_ended = True
            except ssl.SSLZeroReturnError:
                self.is_ended = True
        return plaintext, self._outgoing.read()

    def handshake(self, connected: socket.socket) -> TlsClient:
        """Complete the handshake on a socket that blocks."""
        connected.sendall(self.hello())
        while not self.is_established:
            connected.sendall(self.receive(connected.recv(65536))[1])
        return self

    def record(self, data: bytes) -> bytes:
        """Return ``data`` as records of at most 16 KiB."""
        while data:
            data = data[self.tls.write(data) :]
        return self._outgoing.read()

    def close_notify(self) -> bytes:
        with suppress(ssl.SSLError):
            self.tls.unwrap()
        return self._outgoing.read()


class RecordWriter:
    """Encrypts records for a client that has sent none since its handshake. It must not send any itself any more."""

    def __init__(self, client: TlsClient, key_log: Path) -> None:
        """``key_log`` is the ``keylog_filename`` of the client's context: secrets of its last connection."""
        secrets = {line.split()[0]: line.split()[1:] for line in key_log.read_text().splitlines() if line[0] != "#"}
        self._is_1_3 = client.tls.version() == "TLSv1.3"
        if self._is_1_3:
            self._secret = bytes.fromhex(secrets["CLIENT_TRAFFIC_SECRET_0"][1])
            self._hash = hashlib.sha384 if len(self._secret) == 48 else hashlib.sha256
            self._use(self._secret)
        else:
            client_random, master_secret = map(bytes.fromhex, secrets["CLIENT_RANDOM"])
            server_random = client.received[11:43]  # after the headers of record and message, and the version
            seed = server_random + client_random
            key_block = _prf_1_2(master_secret, b"key expansion", seed, 2 * 16 + 2 * 4)  # AES128-GCM-SHA256
            self._cipher, self._iv = AESGCM(key_block[:16]), key_block[32:36]
            self._number = 1  # the first record was Finished

    def _use(self, secret: bytes) -> None:
        """Derive the keys (RFC 8446 section 7.3)."""
        self._secret, self._number = secret, 0
        self._cipher = AESGCM(self._expand(b"key", 32 if len(secret) == 48 else 16))
        self._iv = self._expand(b"iv", 12)

    def _expand(self, label: bytes, size: int) -> bytes:
        """HKDF-Expand-Label (RFC 8446 section 7.1), for at most the size of a hash."""
        label = b"tls13 " + label
        info = struct.pack("!HB", size, len(label)) + label + b"\0\1"
        return hmac.digest(self._secret, info, self._hash().name)[:size]

    def record(self, kind: int, content: bytes) -> bytes:
        """Return a record."""
        number = struct.pack("!Q", self._number)
        self._number += 1
        if self._is_1_3:  # RFC 8446 section 5.2
            header = struct.pack("!BHH", APPLICATION_DATA, 0x0303, len(content) + 1 + 16)
            nonce = bytes(a ^ b for a, b in zip(self._iv, bytes(4) + number, strict=True))
            return header + self._cipher.encrypt(nonce, content + bytes([kind]), header)
        header = struct.pack("!BHH", kind, 0x0303, len(content))  # RFC 5246 section 6.2.3.3, RFC 5288 section 3
        body = number + self._cipher.encrypt(self._iv + number, content, number + header)
        return header[:3] + struct.pack("!H", len(body)) + body

    def key_update(self, *, is_requested: bool = False) -> bytes:
        """Return a KeyUpdate, and use new keys after it (RFC 8446 section 7.2)."""
        record = self.record(HANDSHAKE, KEY_UPDATE + bytes([is_requested]))
        self._use(self._expand(b"traffic upd", len(self._secret)))
        return record


def _prf_1_2(secret: bytes, label: bytes, seed: bytes, size: int) -> bytes:
    """RFC 5246 section 5."""
    a, result = label + seed, b""
    while len(result) < size:
        a = hmac.digest(secret, a, "sha256")
        result += hmac.digest(secret, a + label + seed, "sha256")
    return result[:size]


MakeRecord = Callable[[RecordWriter], bytes]
empty_record: MakeRecord = partial(RecordWriter.record, kind=APPLICATION_DATA, content=b"")
renegotiation: MakeRecord = partial(RecordWriter.record, kind=HANDSHAKE, content=CLIENT_HELLO)
WITHOUT_DATA: dict[str, tuple[MakeRecord, ssl.TLSVersion]] = {
    "empty record, TLS 1.2": (empty_record, V1_2),
    "empty record, TLS 1.3": (empty_record, V1_3),
    "key update": (RecordWriter.key_update, V1_3),
    "requested key update": (partial(RecordWriter.key_update, is_requested=True), V1_3),
    "renegotiation": (renegotiation, V1_2),
}
