"""Buffered replies and slow readers."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from contextlib import suppress
from random import Random

import pytest
from support import TIMEOUT, StartServer, connect, wait_until

import echo_async
from echo_async.engines.context import Slot
from echo_async.engines.threads import ThreadConnection
from echo_async.server.registry import Registry

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_slow_reader_receives_ten_mebibytes_unchanged(
    start_server: StartServer, tls: bool, client_context: ssl.SSLContext
) -> None:
    pattern = Random(5500).randbytes(10 * 1024 * 1024)
    with start_server(tls=tls, mode="raw", chunk_size=65536) as server, connect(server) as plain:
        client = client_context.wrap_socket(plain, server_hostname="localhost") if tls else plain
        client.setblocking(False)  # one thread sends and receives: OpenSSL does not allow two threads on one connection
        would_block = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
        unsent, received, seen = memoryview(pattern), bytearray(), -1
        while len(received) < len(pattern):
            while seen != (seen := server.stats.bytes_in):  # until backpressure stops the server
                with suppress(*would_block):
                    while unsent:
                        unsent = unsent[client.send(unsent[:65536]) :]
                select.select([], [], [], 0.005)
            select.select([client], [], [], 0.005)  # TLS can hold data when the socket has none
            with suppress(*would_block):
                for _ in range(40):
                    received += client.recv(65536)
        assert received == pattern
        client.close()


def test_large_reply_being_sent_reports_unsent_bytes() -> None:
    """The write timeout needs it: any progress restarts the timeout."""
    ours, theirs = socket.socketpair()
    size = 8 * 1024 * 1024
    config = echo_async.ServerConfig(chunk_size=65536, limit_message_size=size, no_access_log=True)
    connection = ThreadConnection(Registry(config), Slot(), theirs)
    connection.establish()
    thread = threading.Thread(target=connection.run, daemon=True)
    with ours, theirs:
        thread.start()
        ours.sendall(bytes(size - 1) + b"\n")
        left = size
        while left:
            if left == size // 2:
                wait_until(lambda: connection.unsent() < size)
            left -= len(ours.recv(min(65536, left), socket.MSG_WAITALL))
        ours.shutdown(socket.SHUT_WR)
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert connection.unsent() == 0


class WaitingSocket(socket.socket):
    """Counts the reads that wait for input."""

    waits = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        self.waits += not flags & socket.MSG_DONTWAIT
        return super().recv(size, flags)


def test_thread_reads_chunks_that_have_arrived_without_waiting() -> None:
    ours, theirs = socket.socketpair()
    with ours, WaitingSocket(fileno=theirs.detach()) as accepted:
        ours.sendall(59 * b"x" + b"\n")
        ours.shutdown(socket.SHUT_WR)
        connection = ThreadConnection(Registry(echo_async.ServerConfig(mode="stream", chunk_size=20)), Slot(), accepted)
        connection.establish()
        connection.run()
        assert ours.recv(100) == 59 * b"x" + b"\n"
        assert accepted.waits == 0
