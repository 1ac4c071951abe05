"""Replies that wait for a slow reader."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from contextlib import suppress
from random import Random

import pytest
from support import (
    TIMEOUT,
    StartServer,
    connect,
    wait_until,
)

import echo_async
from echo_async.engines.registry import Registry
from echo_async.engines.threads import ThreadConnection

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_slow_reader_receives_ten_mebibytes_unchanged(
    start_server: StartServer, tls: bool, client_context: ssl.SSLContext
) -> None:
    pattern = Random(5500).randbytes(10 * 1024 * 1024)
    with start_server(tls=tls, mode="raw", chunk_size=65536) as server, connect(server) as plain:
        client = client_context.wrap_socket(plain, server_hostname="localhost") if tls else plain
        client.setblocking(False)  # one thread does both: OpenSSL allows no two of them at one connection
        no_more_now = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
        unsent, received, seen = memoryview(pattern), bytearray(), -1
        while len(received) < len(pattern):
            while seen != (seen := server.stats.bytes_in):  # until the server is held up: nobody reads
                with suppress(*no_more_now):
                    while unsent:
                        unsent = unsent[client.send(unsent[:65536]) :]
                select.select([], [], [], 0.005)
            select.select([client], [], [], 0.005)  # TLS may have something that the socket has no more
            with suppress(*no_more_now):
                for _ in range(40):
                    received += client.recv(65536)
        assert received == pattern
        client.close()


def test_large_reply_being_sent_reports_unsent_bytes() -> None:
    """For the time-out of a client that does not read: it is for no progress at all."""
    ours, theirs = socket.socketpair()
    connection = ThreadConnection(Registry(echo_async.ServerConfig(mode="raw", no_access_log=True)), theirs, None)
    size = 8 * 1024 * 1024
    sending = threading.Thread(target=connection._send, args=[bytes(size)])
    with ours, theirs:
        sending.start()
        left = size
        while left:
            if left == size // 2:
                wait_until(lambda: connection.unsent() < size)
            left -= len(ours.recv(min(65536, left), socket.MSG_WAITALL))
        sending.join(TIMEOUT)
        assert not sending.is_alive()
    assert connection.unsent() == 0
