"""What happens instead of sending a reply as it is, without IO.

A :class:`Script` turns the replies of one connection into actions, which a runner runs one after another. Scripts
compose: one that changes replies wraps the one that makes them. A connection without a script sends its replies.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol


class End(enum.Enum):
    """The last action on a connection."""

    CLOSE = "close"
    RESET = "reset"
    HALF_CLOSE = "half-close"
    STALL = "stall"


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``data`` in a packet of its own."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait; 0 seconds are one turn of the event loop."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """Count under ``kind`` and log that the script does something of which the client is not told."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Timer:
    """Cut all other actions after ``seconds``, whatever is done by then, and do those of ``then()``: an end."""

    seconds: float
    then: Callable[[], Iterator[Action]]


Action = Send | Wait | Timer | Report | End


class Script(Protocol):
    """The replies of one connection.

    They are made one at a time, when the one before has been sent: a reply can be much larger than its message.

    Attributes:
        is_silent: No reply is ever sent: it is left to the client to close the connection.
    """

    is_silent: bool

    def start(self) -> Iterator[Action]:
        """Yield what happens before the first message."""

    def reply(self, data: bytes) -> Iterator[Action]:
        """Yield what happens instead of sending ``data``, the echo of one or more complete messages."""


class EchoScript:
    """Each message is sent back. In ``raw`` mode each read is a message."""

    is_silent = False

    def __init__(self, *, is_raw: bool = False) -> None:
        self._is_raw = is_raw

    def start(self) -> Iterator[Action]:
        return iter(())

    def reply(self, data: bytes) -> Iterator[Action]:
        return map(Send, [data] if self._is_raw else split_messages(data))


def split_messages(data: bytes) -> Iterator[bytes]:
    """Yield each of the complete messages in ``data``."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield data[start:end]
        start = end
