"""``python -m echo_async.server``: options in, a running server until a signal comes, an exit code.

Only this file touches signals, configures logging and prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from .. import __version__
from ..config import EngineName, Mode, ProxyProtocol, ServerConfig
from ..errors import StartError
from ..logs import LogFormat, LogLevel, configure, log
from ..loops import LoopName, log_loop_errors, loop_factory
from ..net import adopt, format_address
from ..server.base import BaseServer
from ..server.server import EchoServer, start_server
from ..server.supervisor import Supervisor, WorkerSettings
from ..server.systemd import listen_descriptors, notify
from ..stdio import discard_output, print_error
from .common import CONTEXT, Seconds, run_command, version_option

if TYPE_CHECKING:
    from ..server.metrics import MetricsServer

__all__ = ["main"]

COULD_NOT_START = 3
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_DEFAULTS = {field.name: field.default for field in fields(ServerConfig)}


def _option(name: str, type: Any, help: str, **more: Any) -> Callable[[Any], Any]:
    """An option for one field of :class:`ServerConfig`, which has the default."""
    default = _DEFAULTS[name.removeprefix("--").replace("-", "_")]
    if default is not None:
        more.setdefault("default", default)
    return click.option(name, type=type, help=help, show_envvar=True, **more)


@click.command(context_settings=CONTEXT)
@_option("--host", str, "Name or address to listen on. 0.0.0.0 or :: for all of the machine's.")
@_option("--port", click.IntRange(0, 65535), "Port to listen on; 0 takes any free one.")
@_option("--uds", click.Path(), "Listen on a Unix socket at this path instead.")
@_option("--fd", click.IntRange(0, 2**31 - 1), "Take over the listening socket that has this descriptor.")
@_option(
    "--mode",
    click.Choice(get_args(Mode)),
    "message: one message, one reply, close. stream: message after message. raw: every byte as it comes (RFC 862).",
)
@_option("--chunk-size", click.IntRange(1, 2**30), "Bytes asked for at each read.")
@_option(
    "--engine",
    click.Choice(get_args(EngineName)),
    "streams: a coroutine a client. protocol: callbacks, for throughput. threads: a thread a client.",
)
@click.option("--threaded", is_flag=True, show_envvar=True, help="The same as --engine threads.")
@click.option(
    "--loop",
    type=click.Choice(get_args(LoopName)),
    default="auto",
    show_envvar=True,
    help="Event loop; auto is uvloop where it is installed.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=1,
    show_envvar=True,
    help="Processes that share the listening socket; limits and time-outs hold for each.",
)
@_option("--backlog", click.IntRange(1, 2**31 - 1), "Connections that the kernel keeps waiting.")
@_option(
    "--limit-connections",
    click.IntRange(1, 2**31 - 1),
    "Connections at a time; more are closed at once.",
    show_default="fits the descriptor limit",
)
@_option("--limit-message-size", click.IntRange(1, 2**40), "Bytes of a message, newline included.")
@_option("--timeout-idle", Seconds(), "Seconds until a client that sends nothing is closed.")
@_option("--timeout-message", Seconds(), "Seconds until a message that was begun has to be finished.")
@_option("--timeout-write", Seconds(), "Seconds until a client that does not read is closed.")
@_option("--timeout-graceful-shutdown", Seconds(), "Seconds that clients get to finish at a stop.")
@_option("--ssl-certfile", click.Path(), "Certificate and chain (PEM): clients have to use TLS. SIGHUP reads it again.")
@_option("--ssl-keyfile", click.Path(), "Its key (PEM), if it is in a file of its own.")
@_option("--ssl-keyfile-password", str, "The password of the key; better given in the environment.")
@_option("--ssl-ca-certs", click.Path(), "CA certificates (PEM): clients have to show a certificate of theirs.")
@_option(
    "--proxy-protocol",
    click.Choice(get_args(ProxyProtocol)),
    "Every connection begins with a PROXY header of this version, which names the client; auto takes both.",
)
@_option(
    "--proxy-allow-from",
    str,
    "Who may connect then: addresses and networks with commas between them, or * for all.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    show_envvar=True,
    help="Serve /metrics (Prometheus) and /healthz on this port; 0 takes any free one.",
)
@click.option(
    "--metrics-address", default="127.0.0.1", show_envvar=True, help="Name or address that the metrics are served on."
)
@click.option(
    "--log-level", type=click.Choice(get_args(LogLevel)), default="info", show_envvar=True, help="Least level shown."
)
@click.option(
    "--log-format",
    type=click.Choice(get_args(LogFormat)),
    default="text",
    show_envvar=True,
    help="Shape of a log line.",
)
@_option("--no-access-log", bool, "No log line for each message.", is_flag=True)
@version_option()
def command(
    loop: LoopName,
    threaded: bool,
    workers: int,
    metrics_port: int | None,
    metrics_address: str,
    log_level: LogLevel,
    log_format: LogFormat,
    **options: Any,
) -> int:
    """Send back every message that clients send, byte for byte.

    A message ends with a newline. What is bound goes to stdout, one line an address; the log goes to
    stderr. SIGINT or SIGTERM stops the server once what was received is answered; a second one, at once.

    \b
    Examples:
      python -m echo_async.server
      python -m echo_async.server --port 7 --mode raw --host ::
      ECHO_ASYNC_PORT=6000 python -m echo_async.server --mode stream --log-format json

    Exit codes: 0 stopped as asked, 2 a bad option, 3 could not start.
    """
    if threaded and not _command_line_has_other_engine():
        options["engine"] = "threads"
    _leave_out_other_places(options)
    config = ServerConfig(**options)
    if config.engine == "threads" and loop == "uvloop":
        raise click.UsageError("--loop uvloop makes no sense with --engine threads, which runs no event loop")
    _refuse_metrics_without_port()
    configure(log_level, log_format)
    try:
        factory = loop_factory("asyncio" if config.engine == "threads" else loop)
        sockets = [adopt(number) for number in listen_descriptors()] or None
        start: Callable[[], Awaitable[EchoServer | Supervisor]] = partial(start_server, config, sockets)
        if workers > 1:
            settings = WorkerSettings(loop, log_level, log_format)
            start = partial(Supervisor.start, config, workers, settings, sockets)
            factory = loop_factory("asyncio")  # the parent serves nobody
        with asyncio.Runner(loop_factory=factory) as runner, _metrics(metrics_address, metrics_port) as metrics:
            facts = {"engine": config.engine, "mode": config.mode, "workers": str(workers), "version": __version__}
            return runner.run(_serve_until_signalled(start, metrics, facts))
    except StartError as error:
        print_error(str(error))
        return COULD_NOT_START


def _is_typed(name: str) -> bool:
    """Whether an option is on the command line, which wins over the environment."""
    return click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE


def _command_line_has_other_engine() -> bool:
    engine = click.get_current_context().params["engine"]
    if engine == "threads" or not _is_typed("engine"):
        return False
    if _is_typed("threaded"):
        raise click.UsageError(f"--threaded is --engine threads: leave out one of it and --engine {engine}")
    return True


def _leave_out_other_places(options: dict[str, Any]) -> None:
    """Where the command line says where to listen, what the environment says of it does not count."""
    if any(map(_is_typed, ("host", "port", "uds", "fd"))):
        for name in ("uds", "fd"):
            if not _is_typed(name):
                options[name] = None


def _refuse_metrics_without_port() -> None:
    context = click.get_current_context()
    address_is_given = context.get_parameter_source("metrics_address") != ParameterSource.DEFAULT
    if address_is_given and context.params["metrics_port"] is None:
        raise click.UsageError("--metrics-address makes no sense without --metrics-port: give the port too")


def _metrics(address: str, port: int | None) -> contextlib.AbstractContextManager[MetricsServer | None]:
    """What serves the metrics, if they are asked for."""
    if port is None:
        return contextlib.nullcontext()
    try:
        from ..server.metrics import MetricsServer
    except ImportError as error:
        raise StartError(f"cannot serve metrics: {error}; install it (pip install 'echo-async[metrics]')") from error
    return MetricsServer(address, port)


class _Signals:
    """What the signals do: the first stops the server, the next one ends it at once; SIGHUP brings new certificates."""

    def __init__(self) -> None:
        self._server: BaseServer | None = None
        self._asked = 0
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._stop, number)

    def started(self, server: BaseServer) -> None:
        self._server = server
        if server.config.ssl_certfile is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        if self._asked:  # while it was starting
            server.close()
        else:
            announce(server)

    def stopped(self) -> None:
        """Only the end of the process is left: no signal is to kill it any more."""
        self.release()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def release(self) -> None:
        """They do again what they do everywhere; uvloop does not see to that when it is closed."""
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        self._asked += 1
        log.info("%s: stopping%s", signal.Signals(number).name, " at once" if self._asked > 1 else "")
        notify("STOPPING=1")
        if self._server is not None:
            self._server.close() if self._asked == 1 else self._server.abort()

    def _reload(self) -> None:
        assert self._server is not None
        try:
            self._server.reload_certificates()
            log.info("SIGHUP: the certificates were read again")
        except StartError as error:
            log.error("SIGHUP: the certificates stay as they were: %s", error)


async def _serve_until_signalled(
    start: Callable[[], Awaitable[EchoServer | Supervisor]], metrics: MetricsServer | None, facts: dict[str, str]
) -> int:
    log_loop_errors(asyncio.get_running_loop())
    signals = _Signals()
    try:
        server = await start()
    except StartError:
        signals.release()
        raise
    if metrics is not None:
        metrics.start(server, facts)
    signals.started(server)
    await server.wait_closed()
    signals.stopped()
    log.info("stopped: %s", server.stats)
    return 0


def announce(server: BaseServer) -> None:
    """Say what can be reached now: on stdout a line an address, to the service manager, and in the log."""
    with contextlib.suppress(ValueError, AttributeError):  # stdout was closed before we started
        try:
            for address in server.addresses:
                print(f"listening on {format_address(address)}", flush=True)
        except OSError:
            discard_output(sys.stdout)
    notify("READY=1")
    log.info("serving %s mode with the %s engine", server.config.mode, server.config.engine)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's arguments if None); return its exit code."""
    return run_command(command, argv)
