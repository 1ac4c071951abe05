"""Loggers, formatters, and the escaping of text from the network, so that no client can forge log lines.

The library only writes to the loggers below ``echo_async``. Only the commands call :func:`configure`.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Literal

LogLevel = Literal["debug", "info", "warning", "error", "critical"]
LogFormat = Literal["text", "json"]

log = logging.getLogger("echo_async.server")
access_log = logging.getLogger("echo_async.access")

TEXT_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(message)s"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
MAX_EXCERPT = 80  # characters of a message in a log line
JOINERS = "\u200c\u200d"  # zero-width joiners: emoji and several scripts need them, and they are harmless


def escape(text: str) -> str:
    r"""Escape every character that could control a terminal or forge a log line.

    Control characters (C0, C1, DEL), newlines, ANSI sequences, bidirectional overrides, lone surrogates and
    all others that are not :meth:`str.isprintable` become ``\xNN`` or ``\uNNNN``. A backslash is doubled, so
    that the result is unambiguous.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_escape_character, text))


def _escape_character(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable() or character in JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def excerpt(message: bytes) -> str:
    """Return the text of a message for a log line: without newline, escaped, truncated to 80 characters.

    Bytes that are not valid UTF-8 become ``\\xNN``. Only the part of the message that fits is processed.
    """
    head = message[: 4 * MAX_EXCERPT + 4]  # UTF-8 has at most 4 bytes per character
    text = ""
    for character in head.removesuffix(b"\n").decode("utf-8", "surrogateescape"):
        is_invalid_byte = "\udc80" <= character <= "\udcff"  # by surrogateescape
        character = f"\\x{ord(character) - 0xDC00:02x}" if is_invalid_byte else _escape_character(character)
        if len(text) + len(character) > MAX_EXCERPT:
            return text + "..."
        text += character
    return text


class RateLimitedLog:
    """Logs at most one line per second, with the number of events since the previous line."""

    def __init__(self, write: Callable[..., object], template: str) -> None:
        self._write = write
        self._template = template
        self._written_at = -math.inf
        self._unwritten = 0

    def __call__(self, *args: object) -> None:
        self._unwritten += 1
        now = time.monotonic()
        if now - self._written_at >= 1:
            suffix = f" (repeated {self._unwritten} times)" if self._unwritten > 1 else ""
            self._written_at, self._unwritten = now, 0
            self._write(self._template + suffix, *args)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (ISO 8601, UTC), level, logger, message, the event's facts, and the labels."""

    def __init__(self, labels: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._labels = {"labels": dict(labels)} if labels else {}

    def format(self, record: logging.LogRecord) -> str:
        import json

        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update(getattr(record, "facts", {}))
        entry.update(self._labels)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure(level: LogLevel, format: LogFormat, labels: Mapping[str, str] | None = None) -> None:
    """Write the ``echo_async`` loggers to stderr, as JSON with ``labels``. Lines that cannot be written are dropped."""
    logging.raiseExceptions = False  # no traceback if stderr is closed or full
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(labels) if format == "json" else logging.Formatter(TEXT_FORMAT, TIME_FORMAT))
    root = logging.getLogger("echo_async")
    root.handlers = [handler]
    root.setLevel(level.upper())
    root.propagate = False
