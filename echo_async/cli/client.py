"""``echo-async client``: options to a connection, messages out and replies back, an exit code."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from functools import partial
from time import perf_counter
from typing import Any

import click
from click.core import ParameterSource

from ..client.asyncio_session import AsyncioSession
from ..client.batching import WINDOW_MESSAGES
from ..client.endpoint import Endpoint, log
from ..client.stream import send_batches
from ..config import FILE, FLAG, SECONDS_OR_ZERO, ClientConfig, Option, integer, options_of
from ..errors import ConfigError, ConnectError, EchoError
from ..loops import loop_factory
from ..stdio import discard_output
from .common import CONTEXT, ExitCode, options, refuse_conflicts, run_command, version_option
from .interrupt import ClientInterrupt
from .output import JsonOutput, Output, OutputClosed
from .stdin import LineSource, has_stdin_lines

DEFAULT_MESSAGE = "Hola Server!"

OPTIONS = {
    **options_of(ClientConfig),
    "ssl_ca_certs": Option(None, "CA certificates (PEM) to trust instead of those of the system.", FILE),
    "ssl_certfile": Option(None, "Client certificate (PEM).", FILE),
    "ssl_keyfile": Option(None, "Private key (PEM), unless the certificate file contains it.", FILE),
    "ssl_no_verify": Option(False, "Do not verify the server certificate (insecure).", FLAG),
    "count": Option(1, "Send the message this many times, like ping; 0: until Ctrl-C.", integer()),
    "interval": Option(1.0, "Seconds between two messages, with --count.", SECONDS_OR_ZERO),
    "udp": Option(False, "Send numbered datagrams, and report which were lost, late or corrupted.", FLAG),
    "size": Option(64, "Bytes per datagram, with --udp; at most 65507 over IPv4.", integer(0, 65_527)),
    "identify": Option(False, "Print what a server in identify mode reports, and compare its message.", FLAG),
    "json": Option(False, "Print a JSON object per reply.", FLAG),
    "quiet": Option(False, "Print no errors; with --count, print only the summary.", FLAG),
    "verbose": Option(False, "Print every step to stderr.", FLAG),
}
CONNECTION_OPTIONS = ("uds", "retry", "send_proxy", "proxy_source", "identify")  # for which UDP has no equivalent
TLS_OPTIONS = ("ssl", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_no_verify", "server_hostname")


HELP = """Send each MESSAGE to an echo server, compare the reply with it, and print the reply.

Without MESSAGE, each line of stdin is a message if stdin is a pipe or a file. Without any line, and with
--count, "Hola Server!" is sent. "-" stands for the lines of stdin. A MESSAGE of several lines is sent line by
line; a MESSAGE that starts with "-" needs "--" before it.

\b
Examples:
  echo-async client
  echo-async client 'first message' 'second message'
  echo-async client --count 5 --interval 0.2
  echo-async client --udp --count 1000 --interval 0 --quiet
  seq 100000 | echo-async client - > replies
  echo-async client --host echo.example --port 7 --ssl --json hola

\b
Exit codes:
  0 all replies matched           1 a reply was lost, late or different
  2 invalid option                3 could not connect
  130 Ctrl-C, without --count     141 stdout was closed by its reader
"""


@click.command(help=HELP, context_settings=CONTEXT)
@click.argument("messages", metavar="[MESSAGE]...", nargs=-1, type=click.UNPROCESSED)
@options(OPTIONS)
@version_option()
@click.pass_context
def command(context: click.Context, /, messages: Sequence[str], **values: Any) -> int:
    is_ping = context.get_parameter_source("count") is not ParameterSource.DEFAULT
    if not is_ping and context.get_parameter_source("interval") is ParameterSource.COMMANDLINE:
        raise ConfigError("--interval requires --count")
    if is_ping and values["identify"]:
        raise ConfigError("--identify and --count are mutually exclusive")
    if not values["udp"] and context.get_parameter_source("size") is ParameterSource.COMMANDLINE:
        raise ConfigError("--size requires --udp")
    make_output = partial(JsonOutput if values["json"] else Output, is_identity=values["identify"])
    output = make_output(quiet=values["quiet"], verbose=values["verbose"])
    if values["verbose"]:
        _log_steps()
    return _run(_make_main(messages, values, is_ping, output), output)


def _make_main(
    messages: Sequence[str], values: dict[str, Any], is_ping: bool, output: Output
) -> Coroutine[Any, Any, bool]:
    if values["udp"]:
        refuse_conflicts(values, "udp", (*CONNECTION_OPTIONS, *TLS_OPTIONS))
        if messages:
            raise ConfigError("--udp conflicts with MESSAGE: datagrams are generated; use --size")
    endpoint = make_endpoint(values, output.print_error)
    if values["udp"]:
        from . import datagram_ping

        return datagram_ping.ping(endpoint, values["size"], values["count"], values["interval"], output)
    session = (IdentifySession if values["identify"] else AsyncioSession)(endpoint)
    if not is_ping:
        return _send_messages(session, _line_source(messages), output)
    from .ping import ping

    return ping(session, _ping_message(messages), values["count"], values["interval"], output)


def _ping_message(messages: Sequence[str]) -> bytes:
    message = _encode_message(messages[0] if messages else DEFAULT_MESSAGE)
    if len(messages) > 1 or "-" in messages or message.count(b"\n") > 1:
        raise ConfigError("--count requires exactly one MESSAGE of one line, which is not -")
    return message


def _line_source(messages: Sequence[str]) -> LineSource:
    """Return the lines to send. A check whose stdin happens to be an empty pipe sends the default message as well."""
    if messages:
        return LineSource([None if message == "-" else _encode_message(message) for message in messages])
    default = _encode_message(DEFAULT_MESSAGE)
    return LineSource([None], default) if has_stdin_lines() else LineSource([default])


def _encode_message(message: str) -> bytes:
    data = message.encode("utf-8") if message.isascii() else os.fsencode(message)  # the bytes of the command line
    return data if data.endswith(b"\n") else data + b"\n"


class IdentifySession(AsyncioSession):
    """Exchanges messages with a server in ``identify`` mode, one at a time. ``line`` is the last reply."""

    keeps_open = False
    line = b""

    async def exchange(self, data: bytes) -> float:
        from ..wire.identity import check_reply, max_reply_size

        started = perf_counter()
        self.line = await self.receive_line(data, max_reply_size(data))
        check_reply(self.line, data, self.name)
        return perf_counter() - started


async def _send_messages(session: AsyncioSession, messages: LineSource, output: Output) -> bool:
    """Send ``messages`` and print the replies; return whether all of them matched.

    :exc:`ConnectError` if the server cannot be reached and no reply was lost before.
    """
    all_matched = True
    async with session, aclosing(send_batches(session, messages, WINDOW_MESSAGES, asyncio.Event())) as results:
        try:
            async for batch, start, end, seconds, error in results:
                replies = batch.data[start:end]
                if replies and isinstance(session, IdentifySession):
                    replies = session.line
                output.print_replies(replies, seconds)
                if error is not None:
                    all_matched = False
                    output.print_failure(error)
        except ConnectError as error:
            if all_matched:
                raise
            output.print_failure(error, "")
    return all_matched


def tls_arguments(values: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of ``tls.client_context`` that the options demand; None without TLS."""
    if not any(values[name] for name in TLS_OPTIONS):
        return None
    files = {name: values[f"ssl_{name}"] for name in ("ca_certs", "certfile", "keyfile")}
    return {**files, "verify": not values["ssl_no_verify"]}


def make_endpoint(values: dict[str, Any], print_message: Callable[[str, str], object]) -> Endpoint:
    """Return where and how to connect; print a warning if the certificate of the server is not verified."""
    given = {name: values[name] for name in options_of(ClientConfig) if name in values} | {"ssl": None}
    if (arguments := tls_arguments(values)) is not None:
        from ..tls import client_context

        if values["ssl_no_verify"]:
            print_message("the server certificate is not verified (--ssl-no-verify)", "warning")
        given["ssl"] = client_context(**arguments)
    return Endpoint(**given)


def _log_steps() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("* %(message)s"))
    logging.raiseExceptions = False  # if stderr is closed: no traceback
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.DEBUG)


def _run(main: Coroutine[Any, Any, bool], output: Output) -> ExitCode:
    """Run ``main``, which returns whether all replies matched; return the exit code."""
    try:
        interrupt = ClientInterrupt(output)
        with interrupt.installed(), asyncio.Runner(loop_factory=loop_factory()) as runner:
            all_matched = runner.run(interrupt.cancel_on_interrupt(main))
        return ExitCode.SUCCESS if all_matched else ExitCode.FAILURE
    except ConnectError as error:
        output.print_failure(error, "")
        return ExitCode.UNAVAILABLE
    except ConfigError:
        raise
    except EchoError as error:
        output.print_error(str(error))
        return ExitCode.FAILURE
    except (asyncio.CancelledError, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    except OutputClosed:
        discard_output(sys.stdout)
        return ExitCode.OUTPUT_CLOSED


main = partial(run_command, command)
