"""Servers and relays with one defect each: what students write, and what proxies and tunnels do."""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator

from support import TIMEOUT, ScriptedDatagrams

CHUNK_SIZE = 20  # bytes, as in the exercise
READ_SIZE = 65_536  # bytes
# The least that mode identify consists of
DESCRIPTION: dict[str, object] = {"server": {"labels": {}}, "kubernetes": {}, "client": {}}


class Server:
    """What the handlers of all connections share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.latest: socket.socket | None = None  # the connection that was accepted last
        self.is_dead = False
        self.stopped = threading.Event()


Handler = Callable[[Server, socket.socket], None]


def read_lines(client: socket.socket) -> Iterator[bytes]:
    """Yield the messages up to the end of input."""
    buffer = b""
    while data := client.recv(READ_SIZE):
        *lines, buffer = (buffer + data).split(b"\n")
        yield from (line + b"\n" for line in lines)


def read_message(client: socket.socket) -> bytes:
    """Return one message, read by few bytes at a time; an incomplete one at the end of input."""
    message, chunk = bytearray(), b"-"
    while b"\n" not in chunk and (chunk := client.recv(CHUNK_SIZE)):
        message += chunk
    return bytes(message[: message.find(b"\n") + 1 or None])


def finish(client: socket.socket) -> None:
    """End a connection without a reset."""
    client.shutdown(socket.SHUT_WR)
    while client.recv(READ_SIZE):
        pass


# What comes back


def greet(server: Server, client: socket.socket) -> None:
    client.sendall(b"220 ready\r\n")
    for line in read_lines(client):
        client.sendall(line)


def echo_the_proxy_header(server: Server, client: socket.socket) -> None:
    client.sendall(b"\r\n\r\n\0\r\nQUIT\n")
    for line in read_lines(client):
        client.sendall(line)


def answer_each_read(server: Server, client: socket.socket) -> None:
    while data := client.recv(READ_SIZE):
        client.sendall(data.strip() + b"\n")


def remove_the_newline(server: Server, client: socket.socket) -> None:
    client.sendall(read_message(client).rstrip(b"\n"))
    finish(client)


def add_a_newline(server: Server, client: socket.socket) -> None:
    buffer = b""
    while data := client.recv(READ_SIZE):
        *lines, buffer = (buffer + data).split(b"\n")
        client.sendall(b"".join(line + b"\n" for line in lines))
    if buffer:
        client.sendall(buffer + b"\n")


def answer_first_packet(server: Server, client: socket.socket) -> None:
    data = client.recv(READ_SIZE)
    client.sendall(data[: data.find(b"\n") + 1 or None])
    finish(client)


def answer_all_that_was_read(server: Server, client: socket.socket) -> None:
    data = b""
    while b"\n" not in data and (more := client.recv(READ_SIZE)):
        data += more
    client.sendall(data)
    finish(client)


def answer_last_chunk(server: Server, client: socket.socket) -> None:
    data = chunk = client.recv(CHUNK_SIZE)
    while data and b"\n" not in chunk:
        data = client.recv(CHUNK_SIZE)
        chunk = data or chunk
    client.sendall(chunk[: chunk.find(b"\n") + 1])
    finish(client)


def decode_each_chunk(server: Server, client: socket.socket) -> None:
    """A chunk ends when nothing arrives for a moment."""
    while data := client.recv(READ_SIZE):
        while select.select([client], [], [], 0.02)[0] and (more := client.recv(READ_SIZE)):
            data += more
        client.sendall(data.decode("utf-8", "replace").encode())


def decode_each_message(server: Server, client: socket.socket) -> None:
    for line in read_lines(client):
        client.sendall(line.decode("utf-8", "replace").encode())


def strip_carriage_returns(server: Server, client: socket.socket) -> None:
    for line in read_lines(client):
        client.sendall(line.replace(b"\r", b""))


def cut_at_64_kib(server: Server, client: socket.socket) -> None:
    for line in read_lines(client):
        client.sendall(line[:65_536])
        if len(line) > 65_536:
            return finish(client)


def lose_what_is_joined(server: Server, client: socket.socket) -> None:
    buffer = b""
    while data := client.recv(READ_SIZE):
        buffer += data
        if b"\n" in buffer:
            client.sendall(buffer[: buffer.index(b"\n") + 1])
            buffer = b""


def reorder(server: Server, client: socket.socket) -> None:
    buffer = b""
    while data := client.recv(READ_SIZE):
        *lines, buffer = (buffer + data).split(b"\n")
        for line in reversed(lines):
            client.sendall(line + b"\n")


# How a connection ends


def close_at_half_close(server: Server, client: socket.socket) -> None:
    """A relay that ends both directions at once. Replies arrive when the client has been silent for a moment."""
    replies = b""
    while data := client.recv(READ_SIZE):
        replies += data
        if not select.select([client], [], [], 0.02)[0]:
            client.sendall(replies)
            replies = b""


def reset_with_input_unread(server: Server, client: socket.socket) -> None:
    client.sendall(read_message(client))


def stay_open_after_the_reply(server: Server, client: socket.socket) -> None:
    client.sendall(read_message(client))
    while client.recv(READ_SIZE):
        pass


def never_end_after_incomplete_input(server: Server, client: socket.socket) -> None:
    """``while b"\\n" not in message`` without a look at the end of input, which is an endless loop."""
    message = read_message(client)
    if not message.endswith(b"\n"):
        server.stopped.wait(TIMEOUT)
    client.sendall(message)
    finish(client)


def never_end(server: Server, client: socket.socket) -> None:
    for line in read_lines(client):
        client.sendall(line)
    server.stopped.wait(TIMEOUT)


def end_an_idle_connection(server: Server, client: socket.socket) -> None:
    """Only that of the check: on a busy machine, others can be silent for as long."""
    for line in read_lines(client):
        client.sendall(line)
        if line == b"idle\n" and not select.select([client], [], [], 0.2)[0]:
            return


# Several clients


def serve_one_at_a_time(server: Server, client: socket.socket) -> None:
    with server.lock:
        for line in read_lines(client):
            client.sendall(line)


def mix_up_clients(server: Server, client: socket.socket) -> None:
    """A global variable for the current client."""
    server.latest = client
    for line in read_lines(client):
        server.latest.sendall(line)


def swallow_a_reset(server: Server, client: socket.socket) -> None:
    """``except ConnectionError: break`` around the answer, in the loop of all connections, which ends it."""
    line = b""
    try:
        for line in read_lines(client):
            if not server.is_dead:
                client.sendall(line)
    except ConnectionError:
        server.is_dead |= bool(line)


def wait_for_a_slow_client(server: Server, client: socket.socket) -> None:
    """One loop for all connections, which reads a message to its end once it has begun."""
    while client.recv(1, socket.MSG_PEEK):
        with server.lock:
            message = b""
            while not message.endswith(b"\n") and (data := client.recv(1 if len(message) < 30 else READ_SIZE)):
                message += data
            client.sendall(message)


def wait_for_a_client_that_does_not_read(server: Server, client: socket.socket) -> None:
    """One loop for all connections, with a blocking ``sendall``."""
    while data := client.recv(READ_SIZE):
        with server.lock:
            client.sendall(data)


def cut_a_client_that_does_not_read(server: Server, client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, READ_SIZE)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 10_000))  # microseconds
    for line in read_lines(client):
        client.sendall(line)


def describe_the_first_client(server: Server, client: socket.socket) -> None:
    """Of two servers behind one address, one is in mode ``identify``."""
    is_first, server.latest = server.latest is None, client
    for line in read_lines(client):
        reply = {"message": line[:-1].decode("latin-1"), "bytes": len(line), "number": 1, **DESCRIPTION}
        client.sendall(json.dumps(reply).encode() + b"\n" if is_first else line)


def answer_datagrams(address: tuple[str, int], answer: Callable[[int, bytes], bytes]) -> ScriptedDatagrams:
    """A UDP server on the address of a TCP server. ``answer`` gets the number of a datagram, too; b"" drops it."""
    return ScriptedDatagrams(lambda number, data: filter(None, [answer(number, data)]), *address)
