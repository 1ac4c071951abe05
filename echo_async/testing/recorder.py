"""What a server of a test saw: its connections, their bytes and messages, datagrams, and what failed."""

from __future__ import annotations

from typing import Any

from ..config import ServerConfig
from ..engines.connection import Connection
from ..engines.threads import ThreadConnection
from ..server.registry import Registry
from ..wire.conversation import MODES, Conversation, RawConversation
from ..wire.script import split_messages


class RecordedConnection:
    """One connection, as the server saw it.

    Attributes:
        number: 1 for the first connection that was established.
        peer: The address of the client, as ``getpeername`` returns it.
        messages: The complete messages, newlines included. In ``raw`` mode each item is the data of one read.
        end: How it ended: "eof" or "reset" by the client, or by the "server"; None while it is open.
    """

    def __init__(self, number: int, peer: Any) -> None:
        self.number = number
        self.peer = peer
        self.messages: list[bytes] = []
        self.end: str | None = None
        self._received = bytearray()

    @property
    def received(self) -> bytes:
        """All bytes, also those that are no message, and those that were discarded."""
        return bytes(self._received)

    @property
    def is_open(self) -> bool:
        """Whether the connection is open."""
        return self.end is None

    def add(self, data: bytes) -> None:
        self._received += data

    def __repr__(self) -> str:
        return f"<connection {self.number} of {self.peer}: {len(self._received)} bytes, end={self.end!r}>"


class Recorder(Registry):
    """A registry that also keeps what was received.

    It is noted before it is counted: what a client has a reply to, or a test has waited for, is there.
    """

    def __init__(self, config: ServerConfig, *, has_handler: bool) -> None:
        super().__init__(config)
        self.seen: list[RecordedConnection] = []  # each connection that was established
        self.received: list[bytes] = []  # the messages of all connections, in the order of arrival
        self.datagrams: list[bytes] = []  # that were answered
        self.errors: list[BaseException] = []  # that functions of the test raised
        self.on_datagram = self.datagrams.append
        base = HandlerConversation if has_handler else MODES[config.mode]
        recording = _derive_recording(base, is_raw=config.mode == "raw", recorder=self)
        self.make_conversation = lambda: recording(config.limit_message_size)

    def add(self, connection: Connection) -> None:
        with self.counters.lock:
            record = RecordedConnection(len(self.seen) + 1, connection.slot.peername)
            self.seen.append(record)
            connection.conversation.record = record  # type: ignore[attr-defined]
            super().add(connection)

    def remove(self, connection: Connection) -> None:
        assert isinstance(connection, ThreadConnection)
        record_of(connection).end = connection.ended_by or "server"
        super().remove(connection)


def record_of(connection: Connection) -> RecordedConnection:
    """Return what is recorded of a connection of a :class:`Recorder`."""
    record: RecordedConnection = connection.conversation.record  # type: ignore[attr-defined]
    return record


class HandlerConversation(RawConversation):
    """The input of a handler, whose messages are counted; there is no limit, and none is incomplete."""

    __slots__ = ("_rest",)

    def __init__(self, max_message_size: int) -> None:
        super().__init__(max_message_size)
        self._rest = bytearray()

    def receive(self, data: bytes) -> bytes:
        """Return the messages that ``data`` completes."""
        self.received += len(data)
        self.discarded += len(data)
        self.messages += data.count(b"\n")
        end = data.rfind(b"\n") + 1
        complete = bytes(self._rest + data[:end]) if end else b""
        if end:
            self._rest.clear()
        self._rest += data[end:]
        return complete


def _derive_recording(base: type[Conversation], *, is_raw: bool, recorder: Recorder) -> type[Conversation]:
    """Derive a conversation that notes what it receives before the counters show it."""
    lock, received = recorder.counters.lock, recorder.received

    def receive(self: Any, data: bytes) -> bytes:
        with lock:
            reply = base.receive(self, data)
            messages = ([reply] if reply else []) if is_raw else list(split_messages(reply))
            self.record.add(data)
            self.record.messages += messages
            received.extend(messages)
        return reply

    return type(base.__name__, (base,), {"__slots__": ("record",), "receive": receive})
