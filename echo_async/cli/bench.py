"""``python -m echo_async.bench``: options in, a table or JSON out, an exit code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from ..bench.comparison import Comparison, compare, make_candidates
from ..bench.expectation import Expectation
from ..bench.extra import require_modules
from ..bench.load import LoadResult, find_server, run_load
from ..bench.plan import LoadMode, LoadPlan
from ..bench.plot import PICTURES, draw
from ..bench.report import load_json, print_comparison, print_load, progress_bar
from ..config import CONNECT_TIMEOUT, HOST, PORT, EngineName
from ..errors import ConfigError, ConnectError, EchoError, StartError, describe_error
from ..loops import LoopName, loop_factory
from ..stdio import ignore_broken_pipe, print_error
from .common import CONTEXT, Seconds, run_command, version_option

__all__ = ["main"]

ALL_AS_EXPECTED = 0
NOT_AS_EXPECTED = 1
COULD_NOT_START = 3

LARGEST_MESSAGE = 2**26


class Rate(click.ParamType[float]):
    """Messages a second: more than 0, finite."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            rate = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number of messages a second.", param, ctx)
        if not 0 < rate <= 1e9:
            self.fail(f"{value} makes no sense: give messages a second, more than 0.", param, ctx)
        return rate


def _option(name: str, help: str, **more: Any) -> Callable[[Any], Any]:
    return click.option(name, help=help, show_envvar=True, **more)


@click.group(context_settings=CONTEXT, no_args_is_help=False)
@version_option()
def command() -> None:
    """Measure echo servers: this package's, or any other.

    \b
    Examples:
      python -m echo_async.bench load --port 5500 --duration 5
      python -m echo_async.bench load --mode stream --rate 20000 --expect 'p99<5ms'
      python -m echo_async.bench compare --plot compare.svg
    """


@command.command()
@_option("--host", "Name or address of the server.", default=HOST)
@_option("--port", "Port of the server.", type=click.IntRange(1, 65535), default=PORT)
@_option("--uds", "Connect to the Unix socket at this path instead.", type=click.Path())
@_option("--connections", "Connections at a time.", type=click.IntRange(1, 1_000_000), default=10)
@_option("--size", "Bytes of a message, newline included.", type=click.IntRange(1, LARGEST_MESSAGE), default=1024)
@_option("--pipeline", "Messages in flight on a connection.", type=click.IntRange(1, 1_000_000), default=1)
@_option(
    "--mode",
    "message: a connection for each message. stream: message after message on each connection.",
    type=click.Choice(get_args(LoadMode)),
    show_default="message; stream with --pipeline",
)
@_option("--duration", "Seconds to measure.", type=Seconds(), default=10.0)
@_option("--warmup", "Seconds of load before that.", type=Seconds(zero=True), default=1.0)
@_option("--rate", "Open loop: so many messages a second, by the clock.", type=Rate(), show_default="closed loop")
@_option("--processes", "Processes to make the load.", type=click.IntRange(1, 1024), default=1)
@_option("--timeout", "Seconds for connecting, and for late replies.", type=Seconds(), default=CONNECT_TIMEOUT)
@_option("--ssl", "Use TLS. So does each of the options below it.", is_flag=True)
@_option("--ssl-ca-certs", "Trust the certificates in this file, not the system's.", type=click.Path())
@_option("--ssl-no-verify", "Do not check the server's certificate.", is_flag=True)
@_option("--server-hostname", "The name that the certificate has to have.", show_default="the host")
@_option(
    "--expect", "What has to hold, such as 'p99<5ms' or 'rate>1000'; may be given again.", multiple=True, metavar="TEXT"
)
@_option("--json", "JSON instead of a table.", is_flag=True)
@version_option()
def load(expect: Sequence[str], **options: Any) -> int:
    """Load an echo server, and compare every byte that comes back.

    Without --rate, each connection sends the next message when a reply is there (closed loop). With --rate,
    messages are sent by the clock, whatever the server does, and the response time of each counts from the
    moment at which it was due (open loop).

    \b
    Examples:
      python -m echo_async.bench load --port 5500
      python -m echo_async.bench load --mode stream --connections 100 --pipeline 16 --processes 2
      python -m echo_async.bench load --rate 5000 --expect 'p99<5ms' --expect 'lost<1' --json

    \b
    Exit codes:
      0 every byte came back, all as expected      1 something was lost or different, or not as expected
      2 a bad option                               3 could not connect, or an extra is missing
    """
    expectations = [Expectation.parse(text) for text in expect]
    require_modules("numpy", *(() if options["json"] else ("rich",)))
    result = _run(_plan(options))
    return _tell(result, expectations, options["json"])


def _listed(kind: click.ParamType[Any]) -> Callable[..., Any]:
    """Values with commas between them, each of ``kind``, none twice."""

    def convert(context: click.Context, parameter: click.Parameter, text: str) -> list[Any]:
        return list(dict.fromkeys(kind.convert(each.strip(), parameter, context) for each in text.split(",")))

    return convert


def _list_option(name: str, help: str, default: str, kind: click.ParamType[Any]) -> Callable[[Any], Any]:
    return _option(name, f"{help} With commas between.", default=default, callback=_listed(kind), metavar="LIST")


@command.command("compare")
@_list_option("--engines", "Engines.", "threads,streams,protocol", click.Choice(get_args(EngineName)))
@_list_option("--loops", "Event loops; auto: all that are installed.", "auto", click.Choice(get_args(LoopName)))
@_list_option("--chunk-sizes", "Bytes asked for at each read.", "20,256,4096,65536", click.IntRange(1, 2**30))
@_list_option("--sizes", "Bytes of a message.", "1024", click.IntRange(1, LARGEST_MESSAGE))
@_option("--connections", "Connections at a time.", type=click.IntRange(1, 1_000_000), default=10)
@_option("--pipeline", "Messages in flight on a connection.", type=click.IntRange(1, 1_000_000), default=1)
@_option("--mode", "As for load.", type=click.Choice(get_args(LoadMode)), default="stream")
@_option("--rounds", "Times that each is measured.", type=click.IntRange(1, 1000), default=5)
@_option("--duration", "Seconds of each measurement.", type=Seconds(), default=1.0)
@_option("--warmup", "Seconds of load before it.", type=Seconds(zero=True), default=0.25)
@_option("--json", "JSON instead of a table.", is_flag=True)
@_option("--save", "Write the JSON to this file, besides the table.", type=click.Path(dir_okay=False))
@_option("--plot", "Draw a picture: .svg, .png or .pdf.", type=click.Path(dir_okay=False))
@version_option()
def compare_command(**options: Any) -> int:
    """Measure this package's engines and event loops side by side, on servers that it starts itself.

    Every server is measured in every round, one after the other. Where there are two CPUs, the server has one
    and the load the other. Ratios are to the first model; their spread tells how far to trust them.

    \b
    Examples:
      python -m echo_async.bench compare
      python -m echo_async.bench compare --engines streams,protocol --chunk-sizes 20 --sizes 64,1024,16384
      python -m echo_async.bench compare --rounds 9 --save compare.json --plot compare.svg

    Exit codes: 0 measured, 1 a server did not echo, 2 a bad option, 3 could not start.
    """
    _check_files(options)
    require_modules("numpy", *([] if options["json"] else ["rich"]), *(["matplotlib"] if options["plot"] else []))
    comparison = _compare(options)
    text = json.dumps(comparison.as_json(), indent=2)
    with ignore_broken_pipe():
        print(text) if options["json"] else print_comparison(comparison)
    if options["save"]:
        with _writing(options["save"]):
            Path(options["save"]).write_text(text + "\n")
    if options["plot"]:
        with _writing(options["plot"]):
            draw(comparison, options["plot"])
    return ALL_AS_EXPECTED


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EchoError(f"cannot write {path}: {describe_error(error)}") from error


def _check_files(options: dict[str, Any]) -> None:
    """Before minutes of measuring: that what comes out of it can be written."""
    plot = options["plot"]
    if plot and Path(plot).suffix not in PICTURES:
        raise ConfigError(f"plot {plot!r} is no picture that can be drawn: end its name in {', '.join(PICTURES)}")
    for name in ("save", "plot"):
        if options[name] and not Path(options[name]).absolute().parent.is_dir():
            raise ConfigError(f"{name} {options[name]!r} is in no directory that exists: make that first")


def _compare(options: dict[str, Any]) -> Comparison:
    plan = LoadPlan(
        **{name: options[name] for name in ("connections", "pipeline", "mode", "duration", "warmup")},
    )
    candidates = make_candidates(options["engines"], _loops(options["loops"]), options["chunk_sizes"])
    runs = len(candidates) * len(options["sizes"]) * options["rounds"]
    with progress_bar(f"compare {len(candidates)} models", runs) as progress:
        return compare(candidates, options["sizes"], plan, options["rounds"], progress)


def _loops(names: Sequence[LoopName]) -> list[LoopName]:
    """``auto`` stands for every loop that is installed."""
    installed: list[LoopName] = ["asyncio"]
    if loop_factory("auto") is not loop_factory("asyncio"):
        installed.append("uvloop")
    return list(dict.fromkeys(each for name in names for each in (installed if name == "auto" else [name])))


def _plan(options: dict[str, Any]) -> LoadPlan:
    tls = _tls(options)
    mode: LoadMode = options["mode"] or ("stream" if options["pipeline"] > 1 else "message")
    names = ("connections", "size", "pipeline", "duration", "warmup", "rate", "processes", "timeout")
    plan = LoadPlan(mode=mode, tls=tls, **{name: options[name] for name in names})
    return plan.at(*find_server(options["host"], options["port"], options["uds"], plan))


def _tls(options: dict[str, Any]) -> dict[str, Any] | None:
    if not any(options[name] for name in ("ssl", "ssl_ca_certs", "ssl_no_verify", "server_hostname")):
        return None
    name = options["server_hostname"] or ("localhost" if options["uds"] else options["host"].partition("%")[0])
    return {
        "ca_certs": options["ssl_ca_certs"],
        "verify": not options["ssl_no_verify"],
        "server_hostname": name,
    }


def _run(plan: LoadPlan) -> LoadResult:
    with progress_bar("load", plan.warmup + plan.duration) as progress:
        return run_load(plan, progress)


def _tell(result: LoadResult, expectations: Sequence[Expectation], as_json: bool) -> int:
    with ignore_broken_pipe():
        if as_json:
            print(json.dumps(load_json(result, expectations), indent=2))
        else:
            print_load(result, expectations)
    if result.mismatch is not None:
        print_error(
            "connection {connection}: message {message} came back different at offset {offset}: {what}".format(
                **result.mismatch
            )
        )
    missed = [each.text for each in expectations if not each.holds(result)]
    if missed:
        print_error(f"not as expected: {', '.join(missed)}")
    return ALL_AS_EXPECTED if result.everything_came_back and not missed else NOT_AS_EXPECTED


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's arguments if None); return its exit code."""
    try:
        return run_command(command, argv)
    except (StartError, ConnectError) as error:
        print_error(str(error))
        return COULD_NOT_START
    except EchoError as error:
        print_error(str(error))
        return NOT_AS_EXPECTED
