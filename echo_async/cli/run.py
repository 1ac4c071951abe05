"""``echo-async run``: a server for the duration of another command.

The server is a child process in a session of its own, so that Ctrl-C in the terminal does not reach it. It sends its
address on the channel to this process. When the channel ends, whatever the reason, the server shuts down.
``python -m echo_async.cli.run`` is this child.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import click
from click.core import ParameterSource

from ..children import start_child
from ..compat import add_signal_handler
from ..config import ADDRESS_OPTIONS
from ..errors import ConfigError, StartError, describe_error
from ..net import Address
from ..stdio import print_error
from . import server
from .common import CONTEXT, ExitCode, options, run_command, version_option
from .listen import inherited_descriptors

KILL_DELAY = 10.0  # seconds until a command that ignores SIGTERM is killed
TERMINAL_SIGNALS = ("SIGINT", "SIGQUIT")  # which the terminal sends to every process in the foreground
ADDRESS_VARIABLES = {f"ECHO_ASYNC_{name}".upper() for name in (*ADDRESS_OPTIONS, "listen")}
FORWARDED_SIGNALS = (*TERMINAL_SIGNALS, "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}  # to connect to a server on all addresses

DEFAULTS = {"port": 0, "log_level": "warning"}
OPTIONS = {name: replace(option, default=DEFAULTS.get(name, option.default)) for name, option in server.OPTIONS.items()}


class RunCommand(server.ServerCommand):
    """Keeps the arguments, of which those of the server are passed on unchanged."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        arguments = list(args)
        rest = super().parse_args(ctx, args)
        ctx.obj = arguments[: len(arguments) - len(ctx.params["arguments"])]
        return rest


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


@click.command(cls=RunCommand, help=HELP, context_settings={**CONTEXT, "allow_interspersed_args": False})
@click.argument("arguments", metavar="-- COMMAND [ARG]...", nargs=-1, type=click.UNPROCESSED)
@options(OPTIONS)
@version_option()
@click.pass_context
def command(context: click.Context, /, arguments: Sequence[str], **values: Any) -> int:
    if not arguments:
        raise ConfigError("missing COMMAND (usage: echo-async run [OPTIONS] -- COMMAND [ARG]...)")
    server_arguments = context.obj[:-1] if context.obj[-1:] == ["--"] else context.obj
    environment = dict(os.environ)
    specs = values["listen"] or []
    for name in DEFAULTS:
        if context.get_parameter_source(name) is ParameterSource.DEFAULT and not (name == "port" and specs):
            environment[f"ECHO_ASYNC_{name}".upper()] = str(values[name])
    descriptors = inherited_descriptors(specs) + ([] if values["fd"] is None else [values["fd"]])
    with _server(server_arguments, environment, descriptors) as (process, channel):
        return asyncio.run(Run(process, channel, arguments).run())


@contextlib.contextmanager
def _server(
    arguments: Sequence[str], environment: dict[str, str], descriptors: Sequence[int]
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    process, channel = start_child(
        __name__, *arguments, descriptors=descriptors, env=environment, start_new_session=True
    )
    with process, channel:  # closes the channel and waits for the exit
        yield process, channel


class Run:
    """A server that starts, and the command that is run when it is reachable."""

    def __init__(self, server: subprocess.Popen[bytes], channel: socket.socket, arguments: Sequence[str]) -> None:
        self._server = server
        self._channel = channel
        self._arguments = arguments
        self._command: subprocess.Popen[bytes] | None = None
        self._received: int | None = None  # the signal that came before the command

    async def run(self) -> int:
        """Return the exit code; :exc:`~echo_async.StartError` if the server exits before the command."""
        loop = asyncio.get_running_loop()
        for number in signal.valid_signals():
            is_ignored = signal.getsignal(number) is signal.SIG_IGN  # as by nohup
            if isinstance(number, signal.Signals) and number.name in FORWARDED_SIGNALS and not is_ignored:
                add_signal_handler(loop, number, self._forward, number)
        with self._channel.makefile("rb") as lines:
            line = await asyncio.to_thread(lines.readline)
        if self._received is not None:
            return 128 + self._received
        if not line:
            return await self._explain_exit()
        try:
            environment = _environment(json.loads(line))
            self._command = subprocess.Popen(self._arguments, env=environment)  # noqa: ASYNC220
        except (OSError, ValueError) as error:
            self._server.terminate()
            print_error(f"cannot run {self._arguments[0]}: {describe_error(error)}; check the command")
            return ExitCode.NOT_FOUND if isinstance(error, FileNotFoundError) else ExitCode.NOT_EXECUTABLE
        return await self._wait(self._command)

    async def _explain_exit(self) -> int:
        """Return the exit code of a server that has printed why it could not start."""
        code = await asyncio.to_thread(self._server.wait)
        if code not in (ExitCode.INVALID_OPTION, ExitCode.UNAVAILABLE):
            raise StartError(f"server exited with code {code} before it was reachable")
        return code

    async def _wait(self, command: subprocess.Popen[bytes]) -> int:
        exits = [asyncio.create_task(asyncio.to_thread(each.wait)) for each in (command, self._server)]
        await asyncio.wait(exits, return_when=asyncio.FIRST_COMPLETED)
        has_server_exited = exits[1].done()
        if has_server_exited:
            command.terminate()
            await asyncio.wait(exits, timeout=KILL_DELAY)
            command.kill()
        self._server.terminate()
        code, server_code = await asyncio.gather(*exits)
        if has_server_exited or server_code:
            raise StartError(f"server exited with code {server_code} before the command, which was terminated")
        return code if code >= 0 else 128 - code

    def _forward(self, number: signal.Signals) -> None:
        if self._command is None or self._command.poll() is not None:
            self._received = number
            self._server.terminate()  # a second time while it drains: it aborts its connections
        elif number.name not in TERMINAL_SIGNALS or not _is_in_foreground():
            self._command.send_signal(number)


def _environment(address: Any) -> dict[str, str]:
    """Return the environment of the command, with the address of the server and its copy.

    The copy lets a server in the command tell this address from one to listen on (see ``ServerCommand``).
    """
    environment = {name: value for name, value in os.environ.items() if name not in ADDRESS_VARIABLES}
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


# The child


def _serve() -> int:
    channel = int(sys.argv.pop(1))
    threading.Thread(target=_stop_with_parent, args=[channel], daemon=True).start()
    return run_command(server.command, None, obj=partial(_report, channel))


def _stop_with_parent(channel: int) -> None:
    with contextlib.suppress(ConnectionError):
        os.read(channel, 1)  # returns at the end of input
    os.kill(os.getpid(), signal.SIGTERM)


def _report(channel: int, addresses: Sequence[Address]) -> None:
    with contextlib.suppress(ConnectionError):  # the parent has exited
        os.write(channel, json.dumps(addresses[0]).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(_serve())
