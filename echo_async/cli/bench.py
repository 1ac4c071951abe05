"""``python -m echo_async.bench``: measure echo servers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import click

from ..bench.comparison import Comparison, compare, make_candidates
from ..bench.expectation import Expectation
from ..bench.load import find_server, run_load
from ..bench.plan import LoadMode, LoadPlan, TLSOptions
from ..bench.plot import SUFFIXES, draw
from ..bench.report import load_json, print_comparison, print_load, progress_bar
from ..bench.result import LoadResult
from ..config import CONNECT_TIMEOUT, HOST, PORT, EngineName
from ..errors import ConfigError, ConnectError, EchoError, StartError, describe_error
from ..loops import LoopName, loop_factory
from ..net import format_address
from ..stdio import ignore_broken_pipe, print_error
from .common import CONTEXT, Seconds, run_command, version_option

SUCCESS = 0
FAILURE = 1
UNAVAILABLE = 3

MAX_MESSAGE_SIZE = 2**26  # bytes


class Rate(click.ParamType[float]):
    """A number of messages per second, greater than 0."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        with contextlib.suppress(ValueError):
            rate = float(value)
            if 0 < rate <= 1e9:
                return rate
        self.fail(f"{value!r} (must be a number of messages per second greater than 0)", param, ctx)


class CommaSeparated(click.ParamType[list[Any]]):
    """Values of another type, separated by commas; duplicates are removed."""

    name = "list"

    def __init__(self, item_type: click.ParamType[Any]) -> None:
        self._item_type = item_type

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        items = value if isinstance(value, list) else value.split(",")
        return list(dict.fromkeys(self._item_type.convert(item.strip(), param, ctx) for item in items))


def _option(name: str, help: str, **attributes: Any) -> Callable[[Any], Any]:
    return click.option(name, help=help, show_envvar=True, **attributes)


def _list_option(name: str, help: str, default: str, item_type: click.ParamType[Any]) -> Callable[[Any], Any]:
    return _option(name, f"{help}, separated by commas.", default=default, type=CommaSeparated(item_type))


def _load_options(mode: dict[str, Any], duration: float, warmup: float) -> Callable[[Any], Any]:
    """Return a decorator that adds the options that both commands have."""
    integer = click.IntRange(1, 1_000_000)
    decorators = [
        _option("--connections", "Number of concurrent connections.", type=integer, default=10),
        _option("--pipeline", "Messages in flight on each connection.", type=integer, default=1),
        _option(
            "--mode",
            "message: one connection per message. stream: many messages on each connection.",
            type=click.Choice(get_args(LoadMode)),
            **mode,
        ),
        _option("--duration", "Seconds of each measurement.", type=Seconds(), default=duration),
        _option("--warmup", "Seconds of load before each measurement.", type=Seconds(zero=True), default=warmup),
        _option("--json", "Print JSON instead of a table.", is_flag=True),
    ]

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


@click.group(context_settings=CONTEXT, no_args_is_help=False)
@version_option()
def command() -> None:
    """Measure echo servers: the one of this package, or any other.

    \b
    Examples:
      python -m echo_async.bench load --port 5500 --duration 5
      python -m echo_async.bench load --mode stream --rate 20000 --expect 'p99<5ms'
      python -m echo_async.bench compare --plot compare.svg
    """


@command.command()
@_option("--host", "Host name or address of the server.", default=HOST)
@_option("--port", "Port of the server.", type=click.IntRange(1, 65535), default=PORT)
@_option("--uds", "Path of the server's Unix socket, instead of a host and port.", type=click.Path())
@_option("--size", "Bytes per message, including the newline.", type=click.IntRange(1, MAX_MESSAGE_SIZE), default=1024)
@_load_options({"show_default": "message; stream with --pipeline"}, duration=10.0, warmup=1.0)
@_option("--rate", "Messages per second, sent by the clock (open loop).", type=Rate(), show_default="closed loop")
@_option("--processes", "Number of load generator processes.", type=click.IntRange(1, 1024), default=1)
@_option("--timeout", "Seconds to wait for connecting and for late replies.", type=Seconds(), default=CONNECT_TIMEOUT)
@_option("--ssl", "Use TLS. Implied by the options below.", is_flag=True)
@_option("--ssl-ca-certs", "File of trusted CA certificates, instead of the system's.", type=click.Path())
@_option("--ssl-no-verify", "Do not verify the server's certificate.", is_flag=True)
@_option("--server-hostname", "Host name to verify in the server's certificate.", show_default="the host")
@_option(
    "--expect",
    "Condition that the result has to meet, such as 'p99<5ms' or 'rate>1000'. Repeatable.",
    multiple=True,
    metavar="TEXT",
)
@version_option()
def load(expect: Sequence[str], **options: Any) -> int:
    """Load an echo server, and compare every byte of the replies.

    Without --rate, each connection sends the next message when a reply arrives (closed loop). With --rate,
    messages are sent by the clock, and the response time of each counts from the time at which it was
    due (open loop).

    \b
    Examples:
      python -m echo_async.bench load --port 5500
      python -m echo_async.bench load --mode stream --connections 100 --pipeline 16 --processes 2
      python -m echo_async.bench load --rate 5000 --expect 'p99<5ms' --expect 'lost<1' --json

    \b
    Exit codes:
      0 all replies matched, all expectations met    1 a reply lost or different, or an expectation not met
      2 invalid option                               3 could not connect, or a package is missing
    """
    expectations = [Expectation.parse(text) for text in expect]
    _require_packages("numpy", *(() if options["json"] else ("rich",)))
    plan = _make_plan(options)
    with progress_bar("load", plan.warmup + plan.duration) as progress:
        result = run_load(plan, progress)
    return _report_load(result, expectations, options["json"])


@command.command("compare")
@_list_option("--engines", "Engines", "threads,streams,protocol", click.Choice(get_args(EngineName)))
@_list_option("--loops", "Event loops (auto: all that are installed)", "auto", click.Choice(get_args(LoopName)))
@_list_option("--chunk-sizes", "Bytes per read", "20,256,4096,65536", click.IntRange(1, 2**30))
@_list_option("--sizes", "Bytes per message, including the newline", "1024", click.IntRange(1, MAX_MESSAGE_SIZE))
@_load_options({"default": "stream"}, duration=1.0, warmup=0.25)
@_option("--rounds", "Number of measurements of each server.", type=click.IntRange(1, 1000), default=5)
@_option("--save", "Also write the JSON to this file.", type=click.Path(dir_okay=False))
@_option("--plot", "Draw a picture to this .svg, .png or .pdf file.", type=click.Path(dir_okay=False))
@version_option()
def compare_command(**options: Any) -> int:
    """Compare the engines and event loops of this package, on servers that it starts itself.

    Every round measures every server once, one after the other. On a machine with two CPUs or more, the server
    and the load run on one each. Ratios are relative to the first server; their spread shows how reliable they
    are.

    \b
    Examples:
      python -m echo_async.bench compare
      python -m echo_async.bench compare --engines streams,protocol --chunk-sizes 20 --sizes 64,1024,16384
      python -m echo_async.bench compare --rounds 9 --save compare.json --plot compare.svg

    Exit codes: 0 success, 1 a reply lost or different, 2 invalid option, 3 a server could not start, or a
    package is missing.
    """
    _check_output_files(options)
    _require_packages("numpy", *([] if options["json"] else ["rich"]), *(["matplotlib"] if options["plot"] else []))
    comparison = _compare(options)
    text = json.dumps(comparison.as_json(), indent=2)
    with ignore_broken_pipe():
        print(text) if options["json"] else print_comparison(comparison)
    if options["save"]:
        with _write_errors(options["save"]):
            Path(options["save"]).write_text(text + "\n")
    if options["plot"]:
        with _write_errors(options["plot"]):
            draw(comparison, options["plot"])
    return SUCCESS


def _require_packages(*names: str) -> None:
    """Raise :exc:`~echo_async.StartError` unless the packages of the extra ``bench`` are installed."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise StartError(f"cannot import {name}: {error}; pip install 'echo-async[bench]'") from error


@contextlib.contextmanager
def _write_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EchoError(f"cannot write {path}: {describe_error(error)}") from error


def _check_output_files(options: dict[str, Any]) -> None:
    """Raise before minutes of measurements if their results could not be written."""
    plot = options["plot"]
    if plot and Path(plot).suffix not in SUFFIXES:
        raise ConfigError(f"invalid plot: {plot!r} (must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]})")
    for name in ("save", "plot"):
        if options[name] and not Path(options[name]).absolute().parent.is_dir():
            raise ConfigError(f"invalid {name}: {options[name]!r} (must be in an existing directory)")


def _compare(options: dict[str, Any]) -> Comparison:
    names = ("connections", "pipeline", "mode", "duration", "warmup")
    plan = LoadPlan(**{name: options[name] for name in names})
    candidates = make_candidates(options["engines"], _installed_loops(options["loops"]), options["chunk_sizes"])
    measurements = len(candidates) * len(options["sizes"]) * options["rounds"]
    with progress_bar(f"compare {len(candidates)} servers", measurements) as progress:
        return compare(candidates, options["sizes"], plan, options["rounds"], progress)


def _installed_loops(names: Sequence[LoopName]) -> list[LoopName]:
    """Replace ``auto`` by every installed event loop."""
    installed: list[LoopName] = ["asyncio"]
    if loop_factory("auto") is not loop_factory("asyncio"):
        installed.append("uvloop")
    return list(dict.fromkeys(each for name in names for each in (installed if name == "auto" else [name])))


def _make_plan(options: dict[str, Any]) -> LoadPlan:
    mode: LoadMode = options["mode"] or ("stream" if options["pipeline"] > 1 else "message")
    names = ("connections", "size", "pipeline", "duration", "warmup", "rate", "processes", "timeout")
    plan = LoadPlan(mode=mode, tls=_tls_options(options), **{name: options[name] for name in names})
    return plan.with_address(*find_server(options["host"], options["port"], options["uds"], plan))


def _tls_options(options: dict[str, Any]) -> TLSOptions | None:
    if not any(options[name] for name in ("ssl", "ssl_ca_certs", "ssl_no_verify", "server_hostname")):
        return None
    name = options["server_hostname"] or ("localhost" if options["uds"] else options["host"].partition("%")[0])
    return {"ca_certs": options["ssl_ca_certs"], "verify": not options["ssl_no_verify"], "server_hostname": name}


def _report_load(result: LoadResult, expectations: Sequence[Expectation], as_json: bool) -> int:
    """Print the result; return the exit code."""
    with ignore_broken_pipe():
        if as_json:
            print(json.dumps(load_json(result, expectations), indent=2))
        else:
            print_load(result, expectations)
    if result.mismatch is not None:
        print_error(f"{result.describe_failures()}; is {format_address(result.plan.address)} an echo server?")
    unmet = [each.text for each in expectations if not each.is_met(result)]
    if unmet:
        print_error(f"expectation not met: {', '.join(unmet)}")
    return SUCCESS if result.is_complete and not unmet else FAILURE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the arguments of the process) and return its exit code."""
    try:
        return run_command(command, argv)
    except (StartError, ConnectError) as error:
        print_error(str(error))
        return UNAVAILABLE
    except EchoError as error:
        print_error(str(error))
        return FAILURE
