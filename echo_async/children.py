"""Child processes of the commands: modules of this package that import what their parent imports.

Parent and child communicate over a socket pair, not over the standard streams, which are for people.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import RawIOBase
from typing import Any

from .errors import StartError, describe_error


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs ``module`` as ``python -m`` does, with the imports and the flags of this process.

    ``-m`` alone would find the files of the current directory first, and not the package where only this process has
    it on ``sys.path``. ``-P`` leaves the directory out while the interpreter starts. :mod:`multiprocessing` passes on
    flags and path likewise (CPython: Lib/multiprocessing/spawn.py).
    """
    path = ascii([each for each in sys.path if isinstance(each, str)])
    code = f"import runpy, sys; sys.path[:] = {path}; runpy.run_module(sys.argv.pop(1), None, '__main__', True)"
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-P", "-c", code, module, *arguments]


def start_child(
    module: str, *arguments: str, descriptors: Sequence[int] = (), **options: Any
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a child process with ``options`` of Popen; return it and this end of the channel to it.

    Its first argument is the descriptor of the other end. It also inherits ``descriptors`` and stderr.
    :exc:`~echo_async.StartError` if it cannot be started.
    """
    channel, child_channel = socket.socketpair()
    with child_channel, contextlib.ExitStack() as on_failure:
        on_failure.enter_context(channel)
        number = child_channel.fileno()
        command = child_command(module, str(number), *arguments)
        null = subprocess.DEVNULL
        try:
            process = subprocess.Popen(command, stdin=null, stdout=null, pass_fds=[number, *descriptors], **options)
        except OSError as error:
            raise StartError(f"cannot start {sys.executable}: {describe_error(error)}") from error
        on_failure.pop_all()
        return process, channel


@contextlib.contextmanager
def blocked_signals(signals: Iterable[int]) -> Iterator[None]:
    """Block ``signals``, so that a child started in this block is not killed before it can handle them."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def receive_settings(channel: RawIOBase) -> Any:
    """Return what the parent writes first, a line of JSON. If the parent ends before, so does this process."""
    line = channel.readline()
    if not line.endswith(b"\n"):
        sys.exit()
    return json.loads(line)
