"""``python -m echo_async.client``: options in, messages out and replies back, an exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from ssl import SSLContext
from typing import Any

import click
from click.core import ParameterSource

from ..awaitable import AwaitableContextManager
from ..client.client import ClientOptions, EchoClient, connect
from ..client.connector import log
from ..client.stream import Source
from ..config import CONNECT_TIMEOUT, HOST, PORT, REPLY_TIMEOUT
from ..errors import ConfigError, ConnectError, EchoError
from ..loops import loop_factory
from ..stdio import discard_output
from ..tls import client_context
from .common import CONTEXT, Seconds, run_command, version_option
from .output import Interrupted, JsonOutput, Output, OutputClosed
from .ping import ping
from .session import converse
from .signals import Interrupts
from .stdin import Lines, stdin_has_lines

__all__ = ["main"]

MESSAGE = "Hola Server!"

EVERY_MESSAGE_CAME_BACK = 0
NOT_ALL_CAME_BACK = 1
COULD_NOT_CONNECT = 3
INTERRUPTED = 130  # as the shell tells of a process that SIGINT ended
OUTPUT_CLOSED = 141  # ... and of one that SIGPIPE ended


def _option(name: str, help: str, **more: Any) -> Callable[[Any], Any]:
    return click.option(name, help=help, show_envvar=True, **more)


@click.command(context_settings=CONTEXT)
@click.argument("messages", metavar="[MESSAGE]...", nargs=-1, type=click.UNPROCESSED)
@_option("--host", "Name or address of the server.", default=HOST)
@_option("--port", "Port of the server.", type=click.IntRange(1, 65535), default=PORT)
@_option("--uds", "Connect to the Unix socket at this path instead.", type=click.Path())
@_option("--timeout", "Seconds for each reply.", type=Seconds(), default=REPLY_TIMEOUT)
@_option("--connect-timeout", "Seconds for the connection.", type=Seconds(), default=CONNECT_TIMEOUT)
@_option("--retry", "Keep trying to connect for so many seconds.", type=Seconds(zero=True), default=0.0)
@_option("--count", "Send the message so often, as ping does; 0 until Ctrl-C.", type=click.IntRange(0), default=1)
@_option("--interval", "Seconds from one to the next, with --count.", type=Seconds(zero=True), default=1.0)
@_option("--ssl", "Use TLS. So does each of the options below.", is_flag=True)
@_option("--ssl-ca-certs", "Trust the certificates in this file, not the system's.", type=click.Path())
@_option("--ssl-certfile", "Show this certificate to the server.", type=click.Path())
@_option("--ssl-keyfile", "The certificate's key, if it is in a file of its own.", type=click.Path())
@_option("--ssl-no-verify", "Do not check the server's certificate: anyone could answer.", is_flag=True)
@_option("--server-hostname", "The name that the server's certificate has to have.", show_default="the host")
@_option("--json", "One JSON object for each reply.", is_flag=True)
@_option("--quiet", "Replies only, no errors; with --count, the summary only.", is_flag=True)
@_option("--verbose", "Tell each step on stderr.", is_flag=True)
@version_option()
@click.pass_context
def command(context: click.Context, /, messages: Sequence[str], **options: Any) -> int:
    """Send each MESSAGE to an echo server, and print what comes back, once it is known to be the same.

    Without MESSAGE, each line of stdin is a message if stdin is a pipe or a file; else, and with --count,
    "Hola Server!" is sent. "-" stands for the lines of stdin. A MESSAGE of several lines is sent as its lines; one that
    starts with "-" needs "--" before it.

    \b
    Examples:
      python -m echo_async.client
      python -m echo_async.client 'first message' 'second message'
      python -m echo_async.client --count 5 --interval 0.2
      seq 100000 | python -m echo_async.client - > replies
      python -m echo_async.client --host echo.example --port 7 --ssl --json hola

    \b
    Exit codes:
      0 every message came back       1 a reply was lost, late or different
      2 a bad option                  3 could not connect
      130 Ctrl-C                      141 nobody reads stdout any more
    """
    given = context.get_parameter_source
    pinging = given("count") not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    if given("interval") is ParameterSource.COMMANDLINE and not pinging:
        raise ConfigError("--interval is for --count: give that as well (0: until Ctrl-C)")
    if pinging and (len(messages) > 1 or "-" in messages):
        raise ConfigError("--count sends one message again and again: give one MESSAGE, and not -")
    output = (JsonOutput if options["json"] else Output)(quiet=options["quiet"], verbose=options["verbose"])
    if options["verbose"]:
        _show_steps()
    opening = _opening(options, output)
    if pinging:
        message = _lines(messages[0] if messages else MESSAGE)
        if message.count(b"\n") > 1:
            raise ConfigError("--count sends one message again and again: give a MESSAGE of one line")
        return _run(ping(opening, message, options["count"], options["interval"], output), output)
    return _run(_converse(opening, Lines(_parts(messages)), output), output)


def _parts(messages: Sequence[str]) -> list[bytes | None]:
    """What to send: lines, or None for those of stdin."""
    if messages:
        return [None if message == "-" else _lines(message) for message in messages]
    return [None if stdin_has_lines() else _lines(MESSAGE)]


def _lines(message: str) -> bytes:
    data = message.encode("utf-8") if message.isascii() else os.fsencode(message)  # the bytes that were typed
    return data if data.endswith(b"\n") else data + b"\n"


def _opening(options: dict[str, Any], output: Output) -> AwaitableContextManager[EchoClient]:
    given: ClientOptions = {
        "uds": options["uds"],
        "timeout": options["timeout"],
        "connect_timeout": options["connect_timeout"],
        "retry": options["retry"],
        "ssl": _context(options, output),
        "server_hostname": options["server_hostname"],
    }
    return connect(options["host"], options["port"], **given)


def _context(options: dict[str, Any], output: Output) -> SSLContext | None:
    names = ("ssl", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_no_verify", "server_hostname")
    if not any(options[name] for name in names):
        return None
    if options["ssl_no_verify"]:
        output.error("the server's certificate is not checked (--ssl-no-verify)", "warning")
    return client_context(
        ca_certs=options["ssl_ca_certs"],
        certfile=options["ssl_certfile"],
        keyfile=options["ssl_keyfile"],
        verify=not options["ssl_no_verify"],
    )


def _show_steps() -> None:
    """The client's log, as the steps that --verbose promises."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("* %(message)s"))
    logging.raiseExceptions = False  # stderr closed: no steps, and no traceback
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG)


async def _converse(opening: AwaitableContextManager[EchoClient], messages: Source, output: Output) -> bool:
    async with opening as client:
        return await converse(client, messages, output)


def _run(main: Coroutine[Any, Any, bool], output: Output) -> int:
    """Run ``main`` to its end, which is whether every message came back; return the exit code."""
    try:
        with Interrupts(output) as interrupts, asyncio.Runner(loop_factory=loop_factory()) as runner:
            everything = runner.run(interrupts.cancel(main))
        return EVERY_MESSAGE_CAME_BACK if everything else NOT_ALL_CAME_BACK
    except ConnectError as error:
        output.unreachable(error)
        return COULD_NOT_CONNECT
    except EchoError as error:
        output.error(str(error))
        return NOT_ALL_CAME_BACK
    except (asyncio.CancelledError, KeyboardInterrupt, Interrupted):
        return INTERRUPTED
    except OutputClosed:
        discard_output(sys.stdout)
        return OUTPUT_CLOSED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's arguments if None); return its exit code."""
    return run_command(command, argv)
