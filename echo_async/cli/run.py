"""``echo-async run``: a server for the duration of another command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import click

from ..background import start_thread
from ..compat import add_signal_handler, remove_signal_handler
from ..config import ADDRESS_OPTIONS
from ..errors import ConfigError, describe_error
from ..net import Address
from ..stdio import print_error
from . import server
from .common import CONTEXT, ExitCode, options, run_command, version_option

if TYPE_CHECKING:
    from ..service.supervisor import Service

KILL_DELAY = 10.0  # seconds until a command that ignores SIGTERM is killed
TERMINAL_SIGNALS = ("SIGINT", "SIGQUIT")  # which the terminal sends to every process in the foreground
# The address of another server, and a secret, which are not for the command
WITHHELD_VARIABLES = {f"ECHO_ASYNC_{name}".upper() for name in (*ADDRESS_OPTIONS, "listen", "ssl_keyfile_password")}
FORWARDED_SIGNALS = (*TERMINAL_SIGNALS, "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}  # to connect to a server on all addresses

DEFAULTS = {"port": 0, "log_level": "warning"}
OPTIONS = {name: replace(option, default=DEFAULTS.get(name, option.default)) for name, option in server.OPTIONS.items()}

HELP = """Run COMMAND with an echo server, and exit with its exit code.

The server starts first. COMMAND finds its address in ECHO_ASYNC_HOST and ECHO_ASYNC_PORT, or in ECHO_ASYNC_UDS.
When COMMAND exits, the server shuts down gracefully. Signals are forwarded to COMMAND.

\b
Examples:
  echo-async run -- python -m pytest
  echo-async run --mode stream --workers 2 -- sh -c 'echo-async client one two'

\b
Exit codes:
  that of COMMAND, 128+N if signal N ended it    2 invalid option
  3 the server could not start, or it exited     126 COMMAND is not executable, 127 it is not found
"""


@click.command(cls=server.ServerCommand, help=HELP, context_settings={**CONTEXT, "allow_interspersed_args": False})
@click.argument("arguments", metavar="-- COMMAND [ARG]...", nargs=-1, type=click.UNPROCESSED)
@options(OPTIONS)
@version_option()
@click.pass_context
def command(context: click.Context, /, arguments: Sequence[str], **values: Any) -> int:
    if not arguments:
        raise ConfigError("missing COMMAND (usage: echo-async run [OPTIONS] -- COMMAND [ARG]...)")
    run = Run(arguments)
    try:
        server.serve(context, run.handle_signals, run.start_command)
    finally:
        run.stop_command()
    return run.exit_code


class Run:
    """A command, which is started when the server is reachable, and the signals that are forwarded to it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.exit_code: int = ExitCode.SUCCESS
        self._arguments = arguments
        self._command: subprocess.Popen[bytes] | None = None
        self._server: Service | None = None
        self._forwarded: list[signal.Signals] = []

    def handle_signals(self) -> Self:
        """Forward signals from now on, as :class:`ServerSignals` handles those of a server."""
        for number in signal.valid_signals():
            is_ignored = signal.getsignal(number) is signal.SIG_IGN  # as by nohup
            if isinstance(number, signal.Signals) and number.name in FORWARDED_SIGNALS and not is_ignored:
                add_signal_handler(asyncio.get_running_loop(), number, self._forward, number)
                self._forwarded.append(number)
        return self

    def attach(self, server: Service) -> None:
        self._server = server
        if self.exit_code:  # a signal came before
            server.close()

    def ignore(self) -> None:
        """Change nothing: a signal that comes after the command ends nothing."""

    def restore(self) -> None:
        for number in self._forwarded:
            remove_signal_handler(asyncio.get_running_loop(), number)

    def start_command(self, addresses: Sequence[Address]) -> None:
        """Start the command with the address of the server, which is closed when the command exits."""
        assert self._server is not None
        try:
            self._command = subprocess.Popen(self._arguments, env=_environment(addresses[0]))
        except (OSError, ValueError) as error:
            print_error(f"cannot run {self._arguments[0]}: {describe_error(error)}; check the command")
            is_missing = isinstance(error, FileNotFoundError)
            self.exit_code = ExitCode.NOT_FOUND if is_missing else ExitCode.NOT_EXECUTABLE
            self._server.close()
        else:
            close = partial(asyncio.get_running_loop().call_soon_threadsafe, self._server.close)
            start_thread(partial(self._wait, self._command, close), "echo-async run")

    def _wait(self, command: subprocess.Popen[bytes], close_server: Callable[[], object]) -> None:
        code = command.wait()
        self.exit_code = code if code >= 0 else 128 - code
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the server failed before
            close_server()

    def stop_command(self) -> None:
        """End the command of a server that failed; do nothing if it has exited."""
        if self._command is not None and self._command.poll() is None:
            self._command.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._command.wait(KILL_DELAY)
            self._command.kill()

    def _forward(self, number: signal.Signals) -> None:
        if self._command is not None and self._command.poll() is None:
            if number.name not in TERMINAL_SIGNALS or not _is_in_foreground():
                self._command.send_signal(number)
        elif self._server is not None:  # which drains its connections
            self._server.abort()
        else:
            self.exit_code = 128 + number


def _environment(address: Any) -> dict[str, str]:
    """Return the environment of the command, with the address of the server and its copy.

    The copy lets a server in the command tell this address from one to listen on (see ``ServerCommand``).
    """
    environment = {name: value for name, value in os.environ.items() if name not in WITHHELD_VARIABLES}
    if isinstance(address, str):
        values = {"UDS": address.replace("\0", "@")}  # an abstract name
    else:
        host, port = address
        values = {"HOST": LOOPBACK.get(host, host), "PORT": str(port)}
    for name, value in values.items():
        environment |= {f"ECHO_ASYNC_{name}": value, f"{server.RUN_PREFIX}{name}": value}
    return environment


def _is_in_foreground() -> bool:
    """Return whether the terminal sends its signals to this process, and so to the command as well."""
    for descriptor in range(3):
        with contextlib.suppress(OSError, AttributeError):
            if os.tcgetpgrp(descriptor) == os.getpgrp():
                return True
    return False


main = partial(run_command, command)
