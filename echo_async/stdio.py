"""Standard streams that are closed, full or without a reader: no command fails or hangs because of them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import IO


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Run a command in this block. Output that cannot be flushed at the end is discarded.

    stdout escapes what its encoding lacks, as stderr does.

    The interpreter flushes stdout and stderr once more at exit, and replaces the exit code by 120 if
    that fails (``Py_FinalizeEx``).
    """
    _open_standard_descriptors()
    if isinstance(sys.stdout, TextIOWrapper) and not sys.stdout.closed:
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                discard_output(stream)


def _open_standard_descriptors() -> None:
    """Open the closed ones of descriptors 0, 1 and 2, so that no socket gets such a number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # returns the lowest free number, which is this one


@contextlib.contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Run code that prints to stdout in this block. If stdout has no reader, the output is discarded."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # rich raises SystemExit
        discard_output(sys.stdout)


def print_error(text: str, kind: str = "error") -> None:
    """Print one line to stderr, if there is one, that begins with ``kind``."""
    print_to_stderr(f"{kind}: {text}")


def print_to_stderr(text: str) -> None:
    """Print one line to stderr, if there is one."""
    if sys.stderr is not None:
        try:
            print(text, file=sys.stderr, flush=True)
        except (OSError, ValueError):
            discard_output(sys.stderr)


def discard_output(stream: IO[str] | None) -> None:
    """Point the descriptor of ``stream`` at the null device, so that a later flush of its buffer succeeds."""
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            if null > 2:
                os.close(null)
