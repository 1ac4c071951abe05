"""Servers that misbehave as a test demands."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from support import TIMEOUT

from echo_async import EchoClient


class Peer:
    """One connection of a :class:`ScriptedServer`. ``number`` counts from 0."""

    def __init__(self, connected: socket.socket, number: int) -> None:
        # A reset discards data that was not sent yet: send everything immediately.
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connected
        self.number = number
        self.received: list[bytes] = []
        self._lines = connected.makefile("rb")

    def start_tls(self, context: ssl.SSLContext) -> None:
        self._lines.close()
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self._lines = self.socket.makefile("rb")

    def message(self) -> bytes:
        """Return the next message; at the end of input, end the thread."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError
        self.received.append(line)
        return line

    def messages(self) -> Iterator[bytes]:
        while True:
            yield self.message()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._lines.close()
        self.socket.close()


Serve = Callable[[Peer], None]


class ScriptedServer:
    """A server that runs ``serve`` for each connection, in one thread per connection."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        # Linux releases a port that it has selected itself when the listener is shut down.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._reserved.getsockname()
        self._listener = socket.create_server(self.address, backlog=512)
        self._peers: list[Peer] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def received(self) -> list[list[bytes]]:
        """The complete messages of each connection, in the order of acceptance."""
        return [peer.received for peer in self._peers]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer = Peer(self._listener.accept()[0], len(self._peers))
                self._peers.append(peer)
                self._threads.append(threading.Thread(target=self._run, args=[peer], daemon=True))
                self._threads[-1].start()

    def _run(self, peer: Peer) -> None:
        with contextlib.suppress(OSError, ValueError), contextlib.closing(peer):
            self._serve(peer)

    def stop_listening(self) -> None:
        """Refuse new connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """End all connections, and refuse new ones. The port stays reserved."""
        self.stop_listening()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(TIMEOUT)

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self._listener.close()
        self._reserved.close()


Start = Callable[[Serve], ScriptedServer]

Answer = Callable[[int, bytes], Iterable[bytes]]
"""Returns the datagrams to send when one is received, which is the first, second, ... of all."""


class ScriptedDatagrams:
    """A UDP server that sends what ``answer`` returns to where the last datagram came from."""

    def __init__(self, answer: Answer, host: str = "127.0.0.1") -> None:
        self._answer = answer
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self.received: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._socket:
            while True:
                data, client = self._socket.recvfrom(70_000)
                if client[:2] == self.address:
                    return
                self.received.append(data)
                for reply in self._answer(len(self.received), data):
                    self._socket.sendto(reply, client)

    def stop_soon(self) -> None:
        """Close the socket after the datagrams received so far; from then on the port refuses datagrams."""
        with contextlib.suppress(OSError):  # it is closed
            self._socket.sendto(b"", self.address)

    def stop(self) -> None:
        self.stop_soon()
        self._thread.join(TIMEOUT)

    def __enter__(self) -> ScriptedDatagrams:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def echo_datagram(number: int, data: bytes) -> Iterable[bytes]:
    return [data]


def echo_all(peer: Peer) -> None:
    for message in peer.messages():
        peer.send(message)


def echo_one(peer: Peer) -> None:
    peer.send(peer.message())


def change_fifth(peer: Peer) -> None:
    for message in peer.messages():
        peer.send(message.replace(b"5", b"V"))


def reply_with(reply: bytes) -> Serve:
    def serve(peer: Peer) -> None:
        peer.message()
        peer.send(reply)

    return serve


def over_tls(context: ssl.SSLContext, serve: Serve = echo_all) -> Serve:
    def serve_over_tls(peer: Peer) -> None:
        peer.start_tls(context)
        serve(peer)

    return serve_over_tls


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    """Make the resolver return ``addresses`` for the name several.example."""
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **kwargs: Any) -> Any:
        if host != "several.example" or kwargs.get("flags"):
            return real(host, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


async def disconnected(client: EchoClient) -> None:
    """Wait until the client has closed its connection between two messages, for which it has no public event."""
    assert client._session.connection is not None
    await client._session.connection.closed
