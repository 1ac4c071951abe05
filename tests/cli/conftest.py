"""A terminal; and what commands change in the process that runs them is restored after each test."""

from __future__ import annotations

import io
import os
import pty
import signal
from collections.abc import Iterator

import pytest

from echo_async.cli.run import FORWARDED_SIGNALS


@pytest.fixture(autouse=True)
def restore_signal_handlers() -> Iterator[None]:
    handlers = [(number, signal.getsignal(number)) for number in map(signal.Signals.__getitem__, FORWARDED_SIGNALS)]
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def terminal() -> Iterator[tuple[io.FileIO, io.TextIOWrapper]]:
    """Both ends of a terminal: that of the user, and that of a program."""
    primary, secondary = pty.openpty()
    with os.fdopen(primary, "rb", 0) as user, os.fdopen(secondary, "w", encoding="utf-8") as program:
        yield user, program
