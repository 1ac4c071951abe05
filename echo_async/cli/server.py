"""``echo-async server``: options to a configuration, a server until a signal stops it, an exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, get_args

import click
from click.core import ParameterSource

from .. import __version__
from ..compat import DESCRIPTORS, require_feature
from ..config import ADDRESS_OPTIONS, FLAG, HOST_NAME, Option, ServerConfig, choice, integer, options_of
from ..errors import ConfigError, StartError
from ..logs import LogFormat, LogLevel, configure, log
from ..loops import LOOP_CHOICES, LOOP_PATTERN, logged_errors, loop_factory
from ..net import Address, format_address
from ..server.listeners import ListenerConfig
from ..server.server import start_server
from ..service.signals import ServerSignals
from ..service.systemd import listen_descriptors, notify
from ..stats import Stats
from ..stdio import discard_output
from .common import CONTEXT, ExitCode, options, run_command, version_option
from .listen import LISTEN, parse_listeners

if TYPE_CHECKING:
    from ..service.metrics import MetricsServer
    from ..service.supervisor import Service

_LOOP_HELP = "Event loop; auto is uvloop if it is installed, else asyncio. MODULE:FACTORY is imported and called."

OPTIONS = {
    **options_of(ServerConfig),
    "listen": LISTEN,
    "threaded": Option(False, "The same as --engine threads.", FLAG),
    "loop": Option("auto", _LOOP_HELP, choice(LOOP_CHOICES, LOOP_PATTERN)),
    "workers": Option(
        1, "Processes that serve the same addresses; limits and timeouts apply to each.", integer(1, 1024)
    ),
    "metrics_port": Option(
        None, "Port to serve /metrics (Prometheus) and /healthz on; 0 selects a free port.", integer(0, 65535)
    ),
    "metrics_address": Option("127.0.0.1", "Host name or address to serve the metrics on; :: for all.", HOST_NAME),
    "log_level": Option("info", "Lowest level that is logged.", choice(get_args(LogLevel))),
    "log_format": Option("text", "Format of a log line.", choice(get_args(LogFormat))),
}


HELP = """Return every message to the client that sent it, byte for byte.

A message ends with a newline. One line per bound address is printed to stdout; the log is written to
stderr. SIGINT or SIGTERM starts a graceful shutdown; a second signal aborts all connections.

\b
Examples:
  echo-async server
  echo-async server --port 7 --mode raw --host ::
  echo-async server --listen 5500 --listen 5501,tls --ssl-certfile server.pem
  ECHO_ASYNC_PORT=6000 echo-async server --mode stream --log-format json

Exit codes: 0 stopped by a signal, 2 invalid option, 3 could not start.
"""

RUN_PREFIX = "ECHO_ASYNC_RUN_"  # of the copies of what ``echo-async run`` sets


class ServerCommand(click.Command):
    """A command that listens. It ignores the address that ``echo-async run`` set for clients, unless it was changed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for name in ("HOST", "PORT", "UDS"):
            if os.environ.get(f"ECHO_ASYNC_{name}") == os.environ.get(f"{RUN_PREFIX}{name}"):
                os.environ.pop(f"ECHO_ASYNC_{name}", None)
        return super().parse_args(ctx, args)


class Signals(Protocol):
    """What handles the signals of a server; see :class:`ServerSignals`."""

    def attach(self, server: Service) -> None: ...
    def ignore(self) -> None: ...
    def restore(self) -> None: ...


@click.command(cls=ServerCommand, help=HELP, context_settings=CONTEXT)
@options(OPTIONS)
@version_option()
@click.pass_context
def command(context: click.Context, /, **values: Any) -> int:
    serve(context, ServerSignals, _print_addresses)
    return ExitCode.SUCCESS


def serve(
    context: click.Context, handle_signals: Callable[[], Signals], announce: Callable[[Sequence[Address]], object]
) -> None:
    """Run the server that the options of ``context`` configure until it is closed.

    ``handle_signals`` is called in the event loop before the start, ``announce`` when the server is reachable.
    """
    values, listeners = context.params, _listeners(context)
    engine, modes = listeners[0].config.engine, dict.fromkeys(each.config.mode for each in listeners)
    labels = values["labels"] or {}
    configure(values["log_level"], values["log_format"], labels)
    loop = "asyncio" if engine == "threads" else values["loop"]
    factory = loop_factory(loop)
    start: Callable[[], Awaitable[Service]] = partial(start_server, listeners)
    if values["workers"] > 1:
        require_feature(DESCRIPTORS, f"use --workers {values['workers']}")
        from ..service.supervisor import Supervisor

        settings = {name: values[name] for name in ("log_level", "log_format")} | {"loop": loop, "labels": labels}
        start = partial(Supervisor.start, listeners, values["workers"], settings)
        factory = loop_factory("asyncio")  # the supervisor serves no connections
    facts = {"engine": engine, "mode": ",".join(modes), "workers": str(values["workers"]), "version": __version__}
    metrics_server = _metrics_server(values["metrics_address"], values["metrics_port"])
    with (
        asyncio.Runner(loop_factory=factory) as runner,
        metrics_server as metrics,
        logged_errors(runner.get_loop()),
    ):
        configs = [each.config for each in listeners]
        has_names = bool(values["listen"])
        runner.run(_serve(start, configs, handle_signals, announce, metrics, facts | labels, has_names=has_names))


def _listeners(context: click.Context) -> list[ListenerConfig]:
    """Return the configuration of each listener: those of ``--listen``, or one of the other options."""
    values, inherited = _config_values(context), listen_descriptors()
    sources = {name: context.get_parameter_source(name) for name in ("listen", *ADDRESS_OPTIONS)}
    typed = [name for name, source in sources.items() if source is ParameterSource.COMMANDLINE]
    if "listen" not in typed and (typed or sources["listen"] is not ParameterSource.ENVIRONMENT):
        config = ServerConfig(**values)
        if inherited and config.has_faults:
            raise ConfigError("--fault and --fault-sequence conflict with LISTEN_FDS; use --host and --port, or --uds")
        return [ListenerConfig(config, list(inherited))]
    if len(typed) > 1:  # in the environment, an image or a service link may have set the others
        raise ConfigError(f"--listen and --{typed[1]} are mutually exclusive")
    return parse_listeners("--listen" if typed else "ECHO_ASYNC_LISTEN", context.params["listen"], values, inherited)


# What an option on the command line overrides, because it conflicts with it, unless that is there as well
OVERRIDDEN = (
    (("fault", "fault_sequence"), ("fault", "fault_sequence")),
    (ADDRESS_OPTIONS, ("uds", "fd")),
    (("uds",), ("udp", "udp_allow_from")),
)


def _config_values(context: click.Context) -> dict[str, Any]:
    """Return the fields of ``ServerConfig``. The command line overrides conflicting options from the environment."""
    values = {name: context.params[name] for name in options_of(ServerConfig)}
    sources = {name: context.get_parameter_source(name) for name in context.params}
    typed = {name for name, source in sources.items() if source is ParameterSource.COMMANDLINE}
    if context.params["threaded"]:
        if {"threaded", "engine"} <= typed and values["engine"] != "threads":
            raise ConfigError(f"--threaded conflicts with --engine {values['engine']}")
        if "engine" not in typed:
            values["engine"] = "threads"
    for names, conflicting in OVERRIDDEN:
        if typed & {*names}:
            values |= {name: OPTIONS[name].default for name in conflicting if name not in typed}
    loop = context.params["loop"]
    if values["engine"] == "threads" and loop not in ("auto", "asyncio"):
        raise ConfigError(f"--loop {loop} conflicts with --engine threads, which uses no event loop")
    if sources["metrics_address"] is not ParameterSource.DEFAULT and context.params["metrics_port"] is None:
        raise ConfigError("--metrics-address requires --metrics-port")
    return values


def _metrics_server(address: str, port: int | None) -> contextlib.AbstractContextManager[MetricsServer | None]:
    if port is None:
        return contextlib.nullcontext()
    try:
        from ..service.metrics import MetricsServer
    except ImportError as error:
        raise StartError(f"cannot serve metrics: {error}; install it (pip install 'echo-async[metrics]')") from error
    return contextlib.closing(MetricsServer(address, port))


async def _serve(
    start: Callable[[], Awaitable[Service]],
    configs: Sequence[ServerConfig],
    handle_signals: Callable[[], Signals],
    announce: Callable[[Sequence[Address]], object],
    metrics: MetricsServer | None,
    facts: dict[str, str],
    *,
    has_names: bool,
) -> None:
    signals = handle_signals()
    async with contextlib.AsyncExitStack() as on_failure:
        on_failure.callback(signals.restore)
        server = await start()
        on_failure.push_async_callback(server.wait_closed)
        on_failure.callback(server.close)
        if metrics is not None:
            await metrics.start(server, facts, server.listener_names if has_names else ())
        on_failure.pop_all()
    signals.attach(server)
    if server.is_serving():
        announce(server.addresses)
        _log_start(server.listener_names, configs)
    await server.wait_closed()
    signals.ignore()
    counters = await server.fetch_stats()
    for name, stats in zip(server.listener_names, counters, strict=True) if len(counters) > 1 else ():
        log.info("listener %s stopped: %s", name, stats)
    log.info("server stopped: %s", sum(counters, Stats()))


def _print_addresses(addresses: Sequence[Address]) -> None:
    try:
        for address in addresses:
            print(f"listening on {format_address(address)}", flush=True)
    except (OSError, ValueError):  # it is full, has no reader, or was closed
        discard_output(sys.stdout)


def _log_start(names: Sequence[str], configs: Sequence[ServerConfig]) -> None:
    """Report that the server is reachable: to the service manager and in the log."""
    notify("READY=1")
    udp = ", UDP" if configs[0].udp else ""
    details = f"mode {configs[0].mode}{udp}" if len(configs) == 1 else f"{len(configs)} listeners"
    for name, config in zip(names, configs, strict=True) if len(configs) > 1 else ():
        tls, udp = ", TLS" if config.ssl_certfile is not None else "", ", UDP" if config.udp else ""
        log.info("listener %s started: mode %s%s%s", name, config.mode, tls, udp)
    log.info("server started: %s, engine %s", details, configs[0].engine)


main = partial(run_command, command)
