"""The part of a connection that does not depend on its engine: log lines, and what the other parts are.

Nothing here does IO. An engine's connection derives from :class:`Connection`, and adds how bytes are
read and sent and how a connection is ended.
"""

from __future__ import annotations

import contextlib
import math
import ssl
from collections.abc import Iterator
from typing import Any

from ..errors import describe_error
from ..logs import log
from ..net import format_address
from ..wire.conversation import Conversation
from ..wire.script import Wait
from ..wire.text import excerpt
from .context import ServerContext, Slot
from .timeouts import NEWLINE_DELAY, STALLED, TimeoutKind, Timeouts

CHUNKS_PER_TURN = 50  # chunks of one connection before their replies are sent, and others get their turn
MIN_WRITE = 4096  # bytes of replies that do not wait for those to the other chunks that have arrived
LINES_PER_TURN = 100  # access log lines of one connection before others get their turn
TURN = Wait(0)
TIMEOUT_DETAILS = {"idle": "", "message": ": incomplete message", "write": ": peer is not reading"}


class Connection:
    """One connection of any engine."""

    conversation: Conversation

    __slots__ = ("_peername", "context", "conversation", "is_aborted", "runner", "slot", "timeouts")

    def __init__(self, context: ServerContext, slot: Slot) -> None:
        self.context = context
        self.slot = slot
        self.runner: Any = None  # sends the replies of a script: a Runner, whose module imports this one
        self.timeouts: Timeouts | None = None  # None before the first sweep
        self.is_aborted = False  # by the server: the rest of a reply is logged at once
        self._peername = slot.peername

    def establish(self) -> None:
        """Begin the conversation, and count the connection as open."""
        self.conversation = self.context.make_conversation()
        self.context.add(self)

    @property
    def peer(self) -> str:
        """The peer's address, formatted for the log."""
        self.note_peername()
        return format_address(self._peername)

    def note_peername(self) -> None:
        """Look up the peer's address, if there was no handshake: it is not known after the connection is lost."""
        if self._peername is None:
            with contextlib.suppress(OSError, ValueError):  # uvloop: the transport is closed
                self._peername = self.get_extra_info("peername")

    @property
    def answered(self) -> int:
        """Bytes of replies, sent or in the write buffer."""
        return self.conversation.answered if self.runner is None else self.runner.sent

    @property
    def is_delayed(self) -> bool:
        """Whether a script delays replies."""
        return self.runner is not None and self.runner.is_busy

    @property
    def is_stalled(self) -> bool:
        """Whether a script neither reads nor sends."""
        return self.runner is not None and self.runner.is_stalled

    @property
    def is_held_open(self) -> bool:
        """Whether a script leaves it to the client to close the connection."""
        return self.runner is not None and self.runner.is_held_open

    def observe(self) -> tuple[TimeoutKind | None, int, float]:
        """Return the timeout that runs, what changes with progress, and the seconds without any after which it expires.

        A connection waits for one thing at a time.
        """
        conversation, config = self.conversation, self.context.config
        if self.is_stalled:
            return "idle", STALLED, config.timeout_idle
        if unsent := self.unsent():
            return "write", self.answered - unsent, config.timeout_write
        if self.is_delayed:  # the client has to wait
            return None, 0, math.inf
        if conversation.finished and not self.is_held_open:
            return "linger", 0, self.context.linger_timeout
        if conversation.incomplete:
            return "message", conversation.messages, config.timeout_message
        return "idle", conversation.received, config.timeout_idle

    # Provided by the engine.

    def get_extra_info(self, name: str) -> Any:
        """Return ``sockname``, ``peername``, ``tls`` or ``socket``, which is beneath TLS."""
        raise NotImplementedError

    def unsent(self) -> int:
        """Return the bytes of replies that the operating system has not taken yet."""
        raise NotImplementedError

    def drain(self) -> None:
        """Answer what was received, wait for the rest of an incomplete message, then end as :meth:`linger` does."""
        raise NotImplementedError

    def abort(self, *, reset: bool = False) -> None:
        """Close at once, with a reset if ``reset`` is true; what is not sent yet is lost."""
        raise NotImplementedError

    # Used by every engine.

    def linger(self) -> None:
        """Answer nothing more: send replies, close the sending side, discard input until the client closes its side."""
        self.conversation.end_input()
        self.drain()

    def end_script(self) -> None:
        """End the waits of the script: the server is about to end the connection."""
        if self.runner is not None:
            self.runner.end()

    def fail(self, error: Exception) -> None:
        """End this connection alone after an internal error, which is counted and logged."""
        self.context.note_end(self, "failed")
        try:
            self.context.fail(self.peer, error)
        finally:  # to log it can fail as well, for lack of memory
            self.abort()

    def log_lost(self, error: Exception) -> None:
        """Log an error of the transport; one that is not about the connection is an internal error."""
        if not isinstance(error, OSError | RuntimeError):  # RuntimeError: a closed transport of uvloop
            self.context.note_end(self, "failed")
            return self.context.fail(self.peer, error)
        self.context.note_end(self, "tls_failed" if isinstance(error, ssl.SSLError) else "reset")
        log.debug("%s connection lost: %s", self.peer, describe_error(error))

    def log_and_receive(self, chunk: bytes) -> bytes:
        log.debug("%s chunk received: %d bytes: %s", self.peer, len(chunk), excerpt(chunk))
        return self.conversation.receive(chunk)

    def log_reply(self, reply: bytes) -> Iterator[Wait]:
        """Log a line for each message in ``reply``; yield every ``LINES_PER_TURN`` lines.

        A reply can hold many messages. The engine gives other connections their turn at each yield.
        """
        peer, log_message = self.peer, self.context.log_message
        if self.context.config.mode == "raw":
            return log_message(peer, reply)
        start = lines = 0
        while end := reply.find(b"\n", start) + 1:
            log_message(peer, reply[start:end])
            start, lines = end, lines + 1
            if lines % LINES_PER_TURN == 0:
                yield TURN
        return None

    def log_timeout(self, kind: TimeoutKind) -> None:
        seconds = getattr(self.context.config, f"timeout_{kind}")
        log.info("%s %s timeout (%g s)%s", self.peer, kind, seconds, TIMEOUT_DETAILS[kind])

    def log_incomplete(self) -> None:
        """Tell the author of a client what the server waits for, long before the timeout."""
        text = "%s incomplete message for %g s: %d bytes received, waiting for a newline"
        log.info(text, self.peer, NEWLINE_DELAY, self.conversation.incomplete)

    def log_closed(self) -> None:
        conversation = self.conversation
        if conversation.too_long:
            log.warning("%s message too long: over %d bytes", self.peer, conversation.max_message_size)
        elif conversation.incomplete:
            log.warning(
                "%s incomplete message: connection closed after %d bytes without a newline",
                self.peer,
                conversation.incomplete,
            )
        if self.context.log_chunks:
            log.debug(
                "%s connection closed: %d messages, %d bytes received, %d bytes sent",
                self.peer,
                conversation.messages,
                conversation.received,
                self.answered,
            )
