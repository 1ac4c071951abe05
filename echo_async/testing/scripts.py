"""What a test puts in place of an echo: a greeting, replies of its own, replies that wait, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..wire.script import Action, End, Script, Send, Wait, split_messages
from .peer import ClientEnded, Peer

if TYPE_CHECKING:
    from ..engines.threads import ThreadConnection

HOLD_INTERVAL = 0.001  # seconds between two looks whether a reply still has to wait
MAX_HELD_SIZE = 2**20  # bytes of messages that are received while their replies wait

Reply = Callable[[bytes], bytes | None]
Handler = Callable[[Peer], object]


def is_reply(value: object) -> bool:
    """Return whether ``value`` can be sent instead of an echo: bytes, or None for nothing."""
    return isinstance(value, bytes | None)


@dataclass(slots=True)
class ReplyOptions:
    """What is sent, and what instead of an echo. In ``raw`` mode each read is a message.

    What ``reply`` raises is added to ``errors``. While there are ``holds``, replies wait.
    """

    greeting: bytes
    reply: bytes | Reply | None
    replies: Sequence[bytes | None] | None
    is_raw: bool
    errors: list[BaseException]
    holds: list[object] = field(default_factory=list)  # of blocks, which can overlap


class ReplyScript:
    """Sends a greeting first, and for each message what ``inner`` sends, or what ``reply`` returns: None for nothing.

    With ``replies``, one is for each message, and the connection is closed after the last. Messages are received while
    replies wait.
    """

    def __init__(self, connection: ThreadConnection, inner: Script, options: ReplyOptions) -> None:
        self._connection = connection
        self._inner = inner
        self._options = options
        self._left = None if options.replies is None else list(options.replies)
        self.is_silent = inner.is_silent

    def start(self) -> Iterator[Action]:
        if self._options.greeting:
            yield Send(self._options.greeting)
        if self._left == []:
            yield End.CLOSE

    def reply(self, data: bytes) -> Iterator[Action]:
        while self._options.holds and self._connection.runner and not self._connection.runner.is_ending:
            yield Wait(HOLD_INTERVAL)
            if len(data) < MAX_HELD_SIZE:
                data += self._connection.receive_waiting()
        if self._left == []:  # a fault asks for the reply to each message
            return
        for message in [data] if self._options.is_raw else split_messages(data):
            yield from self._reply_to(message)
            if self._left == []:
                yield End.CLOSE
                return

    def _reply_to(self, message: bytes) -> Iterator[Action]:
        reply = self._options.reply
        if self._left is not None:
            reply = self._left.pop(0)
        elif callable(reply):
            try:
                reply = reply(message)
                if not is_reply(reply):
                    raise TypeError(f"invalid value returned by reply: {reply!r} (must be bytes or None)")
            except BaseException as error:  # also that of pytest.fail
                self._options.errors.append(error)
                yield End.RESET
                return
        elif reply is None:
            yield from self._inner.reply(message)
            return
        if reply is not None:
            yield Send(reply)


class HandlerScript:
    """Calls ``handler`` in the thread of the connection, and closes the connection when it returns.

    What it raises is added to ``errors``, unless the connection has ended before what it waited for.
    """

    is_silent = False

    def __init__(self, handler: Handler, connection: ThreadConnection, errors: list[BaseException]) -> None:
        self._handler = handler
        self._connection = connection
        self._errors = errors

    def start(self) -> Iterator[Action]:
        end = End.CLOSE
        try:
            self._handler(Peer(self._connection))
        except ClientEnded:
            pass
        except BaseException as error:  # also that of pytest.fail
            self._errors.append(error)
            end = End.RESET
        with suppress(OSError):  # it is closed
            self._connection.get_extra_info("socket").settimeout(None)  # that of the handler, if it has set one
        yield end

    def reply(self, data: bytes) -> Iterator[Action]:
        return iter(())  # the handler receives itself
