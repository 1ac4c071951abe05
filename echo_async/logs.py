"""What the log shows, and that no client can forge it: text from the network is escaped and cut here.

The library only writes to stdlib loggers under ``echo_async``; ``configure`` is for the commands.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

__all__ = ["LogFormat", "LogLevel", "RateLimitedLog", "access_log", "configure", "escape", "excerpt", "log"]

LogLevel = Literal["debug", "info", "warning", "error", "critical"]
LogFormat = Literal["text", "json"]

log = logging.getLogger("echo_async.server")
access_log = logging.getLogger("echo_async.access")

EXCERPT = 80  # characters of a client's text that a log line shows
_JOINERS = "\u200c\u200d"  # format characters that emoji and several scripts need, and that hide nothing


def escape(text: str) -> str:
    r"""``text`` with nothing in it that drives a terminal or forges a line.

    Control characters (C0, C1, DEL), newlines, ANSI sequences, bidirectional overrides, lone
    surrogates and everything else that :meth:`str.isprintable` refuses become ``\xNN``, ``\uNNNN``;
    a backslash becomes two, so that no text can pretend to have been escaped.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_escape_one, text))


def _escape_one(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable() or character in _JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def excerpt(message: bytes) -> str:
    """The text of a message for one log line: without its newline, escaped, cut at 80 characters.

    Bytes that are not UTF-8 are shown as ``\\xNN``. Only as much of the message is looked at as the
    line can show.
    """
    head = message[: 4 * EXCERPT + 4]  # UTF-8 has at most 4 bytes a character
    shown = ""
    for character in head.removesuffix(b"\n").decode("utf-8", "surrogateescape"):
        # A surrogate of this range stands for a byte that is not UTF-8.
        is_byte = "\udc80" <= character <= "\udcff"
        character = f"\\x{ord(character) - 0xDC00:02x}" if is_byte else _escape_one(character)
        if len(shown) + len(character) > EXCERPT:
            return shown + "..."
        shown += character
    return shown


class RateLimitedLog:
    """A log line that cannot flood: at most one a second, which tells how many it stands for."""

    def __init__(self, write: Callable[..., object], template: str) -> None:
        self._write = write
        self._template = template
        self._written_at = -math.inf
        self._unwritten = 0

    def __call__(self, *facts: object) -> None:
        self._unwritten += 1
        now = time.monotonic()
        if now - self._written_at >= 1:
            since = f" ({self._unwritten} times since the last such line)" if self._unwritten > 1 else ""
            self._written_at, self._unwritten = now, 0
            self._write(self._template + since, *facts)


class TextFormatter(logging.Formatter):
    """``2026-11-23 10:00:00.123 INFO 127.0.0.1:40000 13 bytes: Hola Server!``"""

    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, message, and the facts of the event."""

    def format(self, record: logging.LogRecord) -> str:
        import json

        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update(getattr(record, "facts", {}))
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure(level: LogLevel, format: LogFormat) -> None:
    """Send the ``echo_async`` loggers to stderr. A log that nobody can read any more stops nothing."""
    logging.raiseExceptions = False  # stderr closed or its reader gone: drop the line, without a traceback
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger("echo_async")
    root.handlers = [handler]
    root.setLevel(level.upper())
    root.propagate = False
