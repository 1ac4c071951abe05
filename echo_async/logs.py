"""Loggers and formatters.

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
