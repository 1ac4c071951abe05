"""Loggers and formatters.

The library only writes to the loggers below ``echo_async``. Only the commands call :func:`configure`.
"""

import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import IO, Literal

LogLevel = Literal["debug", "info", "warning", "error", "critical"]
LogFormat = Literal["text", "json"]

log = logging.getLogger("echo_async.server")
access_log = logging.getLogger("echo_async.access")

TEXT_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(message)s"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""The priorities of syslog(3)."""

LOG_INTERVAL = 1.0  # seconds between two lines about events of the same kind


class RateLimitedLog:
    """Logs at most one line per second, with the number of events since the previous line. Safe to use from threads.

    The owner calls :meth:`write_pending` from time to time and at its end, so that the lines account for every event.
    """

    def __init__(self, write: Callable[..., object], template: str) -> None:
        self._write = write
        self._template = template
        self._lock = threading.RLock()  # an event can occur while another is logged, in a destructor
        self._written_at = -math.inf
        self.pending = 0  # events that no line accounts for yet
        self._arguments: tuple[object, ...] = ()  # of the last event

    def __call__(self, *arguments: object) -> None:
        with self._lock:
            self.pending += 1
            self._arguments = arguments
        self.write_pending()

    def write_pending(self, *, at_once: bool = False) -> None:
        """Log the events that no line accounts for, if there was no line within a second or ``at_once``.

        An error of the log, such as that of a filter, does not reach the caller.
        """
        now = time.monotonic()
        with self._lock:
            events, arguments = self.pending, self._arguments
            if not events or (now - self._written_at < LOG_INTERVAL and not at_once):
                return
            self._written_at, self.pending = now, 0
        suffix = f" (repeated {events} times)" if events > 1 else ""
        with contextlib.suppress(Exception):
            self._write(self._template + suffix, *arguments)


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


class JournalFormatter(logging.Formatter):
    """Lines for systemd's journal, which notes the time itself: with a prefix for the priority (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{PRIORITIES[record.levelno]}>{super().format(record)}"


def is_journal(stream: IO[str]) -> bool:
    """Return whether ``stream`` is connected to systemd's journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or no file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def configure(level: LogLevel, format: LogFormat, labels: Mapping[str, str] | None = None) -> None:
    """Write the ``echo_async`` loggers to stderr, as JSON with ``labels``. Lines that cannot be written are dropped."""
    logging.raiseExceptions = False  # no traceback if stderr is closed or full
    handler = logging.StreamHandler(sys.stderr)
    if format == "json":
        handler.setFormatter(JsonFormatter(labels))
    elif is_journal(sys.stderr):
        handler.setFormatter(JournalFormatter())
    else:
        handler.setFormatter(logging.Formatter(TEXT_FORMAT, TIME_FORMAT))
    root = logging.getLogger("echo_async")
    root.handlers = [handler]
    root.setLevel(level.upper())
    root.propagate = False
