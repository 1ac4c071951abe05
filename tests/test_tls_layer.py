"""TLS without IO: records split anywhere, both versions, ends of each direction, records without data."""

from __future__ import annotations

import ssl
import tracemalloc
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from tls_client import (
    APPLICATION_DATA,
    V1_2,
    V1_3,
    WITHOUT_DATA,
    MakeRecord,
    RecordWriter,
    TlsClient,
    make_context,
    renegotiation,
)

from echo_async import ServerConfig
from echo_async.tls import Certificates
from echo_async.wire.tls_layer import (
    MAX_HANDSHAKE_RECORDS,
    MAX_RECORDS_WITHOUT_DATA,
    RECORDS_PER_TURN,
    TlsLayer,
)

MEBIBYTE = bytes(range(256)) * 4096


@pytest.fixture(scope="session")
def server_context(certificate: Path) -> ssl.SSLContext:
    return Certificates(ServerConfig(ssl_certfile=certificate)).context


@pytest.fixture(params=[V1_2, V1_3], ids=lambda version: version.name)
def client_context(request: pytest.FixtureRequest, authority: trustme.CA, tmp_path: Path) -> ssl.SSLContext:
    return make_context(authority, request.param, tmp_path / "keys")


@pytest.fixture
def pair(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> tuple[TlsLayer, TlsClient]:
    return connect(server_context, client_context)


@pytest.fixture
def writer(pair: tuple[TlsLayer, TlsClient], tmp_path: Path) -> RecordWriter:
    return RecordWriter(pair[1], tmp_path / "keys")


def connect(
    server_context: ssl.SSLContext,
    client_context: ssl.SSLContext,
    size: int = 1_000_000,
    session: ssl.SSLSession | None = None,
) -> tuple[TlsLayer, TlsClient]:
    """Complete a handshake, in which the server receives ``size`` bytes at a time."""
    server, client = TlsLayer(server_context), TlsClient(client_context, session=session)
    to_server = client.hello()
    while to_server:
        assert receive(server, to_server, size) == b""
        to_server = client.receive(server.output())[1]
    assert server.is_established
    assert server.error is None
    return server, client


def receive(server: TlsLayer, data: bytes, size: int = 1_000_000) -> bytes:
    """Give ``data`` to the server in pieces; return the plaintext of all turns."""
    plaintext = b""
    for start in range(0, len(data), size):
        plaintext += server.receive(data[start : start + size])
        while server.has_records:
            plaintext += server.receive()
    return plaintext


def test_records_split_anywhere_are_decrypted(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> None:
    for size in (1, 5, 21, 1000):
        server, client = connect(server_context, client_context, size)
        assert server.server_name == "localhost"
        messages = [b"", b"a", b"Hola Server!\n", bytes(2000), b"end"]
        sent = b"".join(map(client.record, messages)) + client.close_notify()
        assert receive(server, sent, size) == b"".join(messages)
        assert server.is_ended
        assert server.error is None


def test_turn_has_a_limited_number_of_records(pair: tuple[TlsLayer, TlsClient]) -> None:
    server, client = pair
    sent = b"".join(client.record(b"x") for _ in range(2 * RECORDS_PER_TURN + 1))
    assert server.receive(sent + b"\x17") == b"x" * RECORDS_PER_TURN
    assert server.has_records
    assert server.has_news
    assert server.receive() == b"x" * RECORDS_PER_TURN
    assert server.receive() == b"x"
    assert not server.has_records
    assert not server.has_news


def test_records_that_wait_for_a_turn_are_not_copied(pair: tuple[TlsLayer, TlsClient]) -> None:
    server, client = pair
    sent = b"".join(client.record(b"x") for _ in range(50 * RECORDS_PER_TURN))
    tracemalloc.start()
    try:
        assert server.receive(sent) + server.receive() == b"x" * 2 * RECORDS_PER_TURN
        assert tracemalloc.get_traced_memory()[1] < len(sent) / 2
    finally:
        tracemalloc.stop()
    receive(server, b"")
    while server.has_records:
        server.receive()
    assert server.unprocessed == 0


without_data = pytest.mark.parametrize(
    ("make_record", "client_context"), WITHOUT_DATA.values(), ids=WITHOUT_DATA, indirect=["client_context"]
)


@without_data
def test_records_without_data_end_the_connection(
    make_record: MakeRecord, pair: tuple[TlsLayer, TlsClient], writer: RecordWriter
) -> None:
    server, _ = pair
    records = [make_record(writer) for _ in range(MAX_RECORDS_WITHOUT_DATA)]
    assert server.receive(b"".join(records)) == b""
    assert server.has_records, "each of them ends a turn"
    receive(server, b"")
    while server.has_records:
        server.receive()
    assert not server.is_ended
    assert receive(server, writer.record(APPLICATION_DATA, b"data")) == b"data"
    for _ in range(MAX_RECORDS_WITHOUT_DATA):
        server.receive(make_record(writer))
    assert server.error is None
    server.receive(make_record(writer))
    assert server.is_ended
    assert str(server.error) == "17 records in a row without data"
    assert server.receive(writer.record(APPLICATION_DATA, b"data")) == b""


@without_data
def test_replies_after_records_without_data_arrive(
    make_record: MakeRecord, pair: tuple[TlsLayer, TlsClient], writer: RecordWriter
) -> None:
    """Keys are updated in both directions, and a renegotiation that was refused changes nothing."""
    server, client = pair
    for number in range(3):
        server.receive(make_record(writer))
        to_client = server.output()
        if make_record is not renegotiation:  # the client has not asked for the alert
            client.receive(to_client)
        assert server.receive(writer.record(APPLICATION_DATA, b"%d" % number)) == b"%d" % number
        if make_record is not renegotiation:
            assert client.receive(server.send(b"reply"))[0] == b"reply"
    assert server.error is None


def test_data_before_an_invalid_record_is_received(pair: tuple[TlsLayer, TlsClient]) -> None:
    server, client = pair
    first, second = client.record(b"first"), bytearray(client.record(b"second"))
    second[-1] ^= 1
    assert server.receive(first + second) == b"first"
    assert server.error is not None
    assert server.output(), "an alert"
    assert server.send(b"too late") == b""


def test_half_close_of_the_client_leaves_the_other_half(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """By close_notify, after which everything is ignored, or without it, also within a record."""
    for size in (None, 0, 4, 20):
        server, client = connect(server_context, client_context)
        sent = client.record(MEBIBYTE)
        rest = client.close_notify() + bytes(100) if size is None else client.record(b"incomplete")[:size]
        assert receive(server, sent + rest, 65536) == MEBIBYTE
        if size is not None:
            server.receive_eof()
        assert server.is_ended
        assert server.error is None
        assert client.receive(server.send(MEBIBYTE) + server.close())[0] == MEBIBYTE
        assert client.is_ended


def test_half_close_of_the_server_leaves_the_other_half(pair: tuple[TlsLayer, TlsClient]) -> None:
    server, client = pair
    record = client.record(b"request")
    client.receive(server.send(b"reply") + server.close())
    assert client.is_ended
    assert receive(server, record) == b"request"
    assert not server.is_ended
    receive(server, client.close_notify())
    assert server.is_ended
    assert server.error is None


def test_end_within_the_handshake_is_an_error(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> None:
    for size in (1, 50, None):
        server = TlsLayer(server_context)
        server.receive(TlsClient(client_context).hello()[:size])
        server.receive_eof()
        assert isinstance(server.error, ssl.SSLEOFError)
    server = TlsLayer(server_context)
    server.receive(TlsClient(client_context).hello())
    server.receive(b"\x15\x03\x03\x00\x02\x01\x00")  # close_notify, not encrypted yet
    assert isinstance(server.error, ssl.SSLZeroReturnError)
    server = TlsLayer(server_context)
    server.receive_eof()
    assert not server.has_input
    assert str(server.error) == "closed by the peer"


OTHER_PROTOCOLS = {
    b"GET / HTTP/1.1\r\n\r\n": "HTTP_REQUEST",
    b"Hola Server!\n": "WRONG_VERSION_NUMBER",
    b"\x16\x03\x01\x50\x00": "PACKET_LENGTH_TOO_LONG|RECORD_LAYER_FAILURE",
    b"\x17\x03\x03\x00\x05Hola\n": "UNEXPECTED_MESSAGE|BAD_RECORD_TYPE",
}


def test_other_protocols_are_refused_at_once(server_context: ssl.SSLContext) -> None:
    for data, reason in OTHER_PROTOCOLS.items():
        server = TlsLayer(server_context)
        server.receive(data)
        assert server.is_ended
        assert isinstance(server.error, ssl.SSLError)
        assert server.error.reason in reason.split("|")


@given(st.lists(st.binary(max_size=2000), max_size=5))
def test_random_input_is_an_error_at_most(server_context: ssl.SSLContext, chunks: list[bytes]) -> None:
    server = TlsLayer(server_context)
    for chunk in chunks:
        assert receive(server, chunk) == b""
    server.receive_eof()
    assert isinstance(server.error, ssl.SSLError if any(chunks) else ConnectionError)


SERVER_NAMES = {
    b"localhost": "localhost",
    "ñandú.e".encode(): "ñandú.e",
    b"\xffbc\x1b[31m\n": "\\\\xffbc\\x1b[31m\\n",
}


def test_server_name_is_escaped_text(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shown in SERVER_NAMES.items():
        server = TlsLayer(server_context)
        server.receive(TlsClient(client_context).hello().replace(b"localhost", name))
        assert server.server_name == shown
        assert server.error is None
    server, extension = TlsLayer(server_context), b"\0\0\0\x0e\0\x0c\0\0\x09localhost"
    server.receive(TlsClient(client_context).hello().replace(extension, b"\xfa\xfa" + extension[2:]))  # another kind
    assert server.server_name is None
    assert server.error is None
    assert capsys.readouterr().err == ""


def test_client_hello_may_have_a_limited_number_of_records(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    hello = TlsClient(client_context).hello()
    server, flooded = TlsLayer(server_context), TlsLayer(server_context)
    receive(server, split_into_records(hello, len(hello) // 25))  # which is longer with newer OpenSSL
    assert server.server_name == "localhost"
    assert server.error is None
    assert server.output(), "a ServerHello"
    single_bytes, size = split_into_records(hello, 1), MAX_HANDSHAKE_RECORDS * len(b"\x16\x03\x01\0\1x")
    receive(flooded, single_bytes[:size])
    assert flooded.error is None
    receive(flooded, single_bytes[size:])
    assert str(flooded.error) == "33 records in a row without data"


def split_into_records(hello: bytes, size: int) -> bytes:
    parts = [hello[each : each + size] for each in range(5, len(hello), size)]
    return b"".join(hello[:3] + len(part).to_bytes(2, "big") + part for part in parts)


def test_session_is_resumed_with_its_client_certificate(
    client_context: ssl.SSLContext, authority: trustme.CA, tmp_path: Path, certificate: Path
) -> None:
    ca_certs = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_certs))
    authority.issue_cert("client@example.org").configure_cert(client_context)
    server_context = Certificates(ServerConfig(ssl_certfile=certificate, ssl_ca_certs=ca_certs)).context
    server, client = connect(server_context, client_context)
    before = server.session.getpeercert()
    assert before
    assert client.receive(server.send(b"ticket"))[0] == b"ticket"
    server, client = connect(server_context, client_context, session=client.tls.session)
    assert client.tls.session_reused
    assert server.session.getpeercert() == before
    assert server.receive(client.record(b"Hola")) == b"Hola"
