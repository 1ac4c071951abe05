"""``echo-async bench``: measure echo servers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import click

from ..bench.comparison import Comparison, compare, make_candidates
from ..bench.disturbance import Disturbance
from ..bench.expectation import Expectation
from ..bench.load import find_server, find_udp_server, run_load
from ..bench.plan import LoadMode, LoadPlan
from ..bench.plot import SUFFIXES, draw
from ..bench.report import load_json, print_comparison, print_load, progress_bar
from ..bench.result import LoadResult
from ..client.datagram_tracker import MAX_PAYLOAD_IPV4
from ..client.endpoint import tls_hostname
from ..compat import DESCRIPTORS, require_feature
from ..config import CONNECT_TIMEOUT, FILE, FLAG, SECONDS, SECONDS_OR_ZERO, EngineName, Kind, Option, choice, integer
from ..errors import ConfigError, EchoError, StartError, describe_error
from ..loops import LOOP_CHOICES, LOOP_PATTERN, loop_factory
from ..net import format_address
from ..stdio import ignore_broken_pipe, print_error
from .client import OPTIONS as CLIENT_OPTIONS
from .client import TLS_OPTIONS, tls_arguments
from .common import CONTEXT, ExitCode, Group, options, refuse_conflicts, run_command, version_option

MAX_MESSAGE_SIZE = 2**26  # bytes
CONNECTIONS = 10
UDP_TIMEOUT = 1.0  # seconds


RATE = Kind(
    "RATE", "must be a number of messages per second greater than 0", lambda value: 0 < value <= 1e9, convert=float
)


def _list(kind: Kind) -> Kind:
    """Return the kind of several values, separated by commas. Duplicates are removed."""
    return Kind(
        "LIST",
        kind.requirement,
        lambda values: not any(map(kind.violation, values)),
        convert=lambda text: list(dict.fromkeys(kind.convert(item.strip()) for item in text.split(","))),
    )


WORKLOAD_OPTIONS = {
    "connections": Option(CONNECTIONS, "Number of concurrent connections.", integer(1, 1_000_000)),
    "pipeline": Option(1, "Messages in flight on each connection.", integer(1, 1_000_000)),
    "mode": Option(
        None,
        "message: one connection per message. stream: many messages on each connection.",
        choice(get_args(LoadMode)),
        default_text="message; stream with --pipeline",
    ),
    "duration": Option(10.0, "Seconds of each measurement.", SECONDS),
    "warmup": Option(1.0, "Seconds of load before each measurement.", SECONDS_OR_ZERO),
    "json": Option(False, "Print JSON instead of a table.", FLAG),
}
LOAD_OPTIONS = {
    **{name: CLIENT_OPTIONS[name] for name in ("host", "port", "uds")},
    "size": Option(1024, "Bytes per message, including the newline.", integer(1, MAX_MESSAGE_SIZE)),
    **WORKLOAD_OPTIONS,
    "processes": Option(1, "Number of load generator processes.", integer(1, 1024)),
    "timeout": Option(
        None,
        "Seconds to wait for connecting and for late replies, or for the reply to a datagram.",
        SECONDS,
        default_text=f"{CONNECT_TIMEOUT:g}; {UDP_TIMEOUT:g} with --udp",
    ),
    "udp": Option(False, "Send datagrams, and report the share of them that is lost.", FLAG),
    **{name: CLIENT_OPTIONS[name] for name in TLS_OPTIONS},
    "rate": Option(None, "Messages per second, sent by the clock (open loop).", RATE, default_text="closed loop"),
    "expect": Option(
        None,
        "Condition that the result has to meet, such as 'p99<5ms' or 'rate>1000'. Repeatable.",
        Kind("TEXT", combine=list, split=str.split),
    ),
}
COMPARE_DEFAULTS: dict[str, dict[str, Any]] = {
    "connections": {"default": None, "default_text": f"{CONNECTIONS}; 1 with --disturb"},
    "mode": {"default": "stream", "default_text": ""},
    "duration": {"default": 1.0},
    "warmup": {"default": 0.25},
}
COMPARE_OPTIONS = {
    "engines": Option("threads,streams,protocol", "Engines, separated by commas.", _list(choice(get_args(EngineName)))),
    "loops": Option(
        "auto",
        "Event loops (auto: asyncio, and uvloop if it is installed), separated by commas.",
        _list(choice(LOOP_CHOICES, LOOP_PATTERN)),
    ),
    "chunk_sizes": Option("20,256,4096,65536", "Bytes per read, separated by commas.", _list(integer(1, 2**30))),
    "sizes": Option(
        "1024",
        "Bytes per message, including the newline, separated by commas.",
        _list(integer(1, MAX_MESSAGE_SIZE)),
    ),
    "disturb": Option(
        None,
        "Measure round trips beside one client that floods the server, or beside N idle connections.",
        Kind("flood|idle=N"),
        default_text="no disturbance",
    ),
    **{name: replace(option, **COMPARE_DEFAULTS.get(name, {})) for name, option in WORKLOAD_OPTIONS.items()},
    "rounds": Option(5, "Number of measurements of each server.", integer(1, 1000)),
    "save": Option(None, "Also write the JSON to this file.", FILE),
    "plot": Option(None, "Draw a picture to this .svg, .png or .pdf file.", FILE),
}


HELP = """Measure echo servers: the one of this package, or any other.

\b
Examples:
  echo-async bench load --port 5500 --duration 5
  echo-async bench load --mode stream --rate 20000 --expect 'p99<5ms'
  echo-async bench compare --plot compare.svg
"""


@click.group(cls=Group, help=HELP, context_settings=CONTEXT, no_args_is_help=False)
@version_option()
def command() -> None:
    require_feature(DESCRIPTORS, "run a benchmark")


LOAD_HELP = """Load an echo server, and compare every byte of the replies.

Without --rate, each connection sends the next message when a reply arrives (closed loop). With --rate,
messages are sent by the clock, and the response time of each counts from the time at which it was
due (open loop).

\b
Examples:
  echo-async bench load --port 5500
  echo-async bench load --mode stream --connections 100 --pipeline 16 --processes 2
  echo-async bench load --rate 5000 --expect 'p99<5ms' --expect 'lost<1' --json
  echo-async bench load --udp --connections 1 --rate 5000

\b
Exit codes:
  0 all replies matched, all expectations met    1 a reply lost or different, or an expectation not met
  2 invalid option                               3 could not connect, or a package is missing
"""


@command.command(help=LOAD_HELP, context_settings=CONTEXT)
@options(LOAD_OPTIONS)
@version_option()
def load(**values: Any) -> ExitCode:
    expectations = [Expectation.parse(text) for text in values["expect"] or ()]
    _require_packages("numpy", *(() if values["json"] else ("rich",)))
    plan = _make_plan(values)
    with progress_bar("load", plan.warmup + plan.duration) as progress:
        result = run_load(plan, progress)
    return _report_load(result, expectations, values["json"])


COMPARE_HELP = """Compare the engines and event loops of this package, on servers that it starts itself.

Every round measures every server once, one after the other. On a machine with two CPUs or more, the server
and the load run on one each. Ratios are relative to the first server; their spread shows how reliable they
are.

With --disturb, each connection makes one round trip after the other, a millisecond apart. The table shows how
long they took, and what the server did for the disturbance meanwhile.

\b
Examples:
  echo-async bench compare
  echo-async bench compare --engines streams,protocol --chunk-sizes 20 --sizes 64,1024,16384
  echo-async bench compare --rounds 9 --save compare.json --plot compare.svg
  echo-async bench compare --disturb flood --chunk-sizes 65536
  echo-async bench compare --disturb idle=10000 --engines streams,protocol --duration 10

Exit codes: 0 success, 1 a reply lost or different, 2 invalid option, 3 a server could not start, or a
package is missing.
"""


@command.command("compare", help=COMPARE_HELP, context_settings=CONTEXT)
@options(COMPARE_OPTIONS)
@version_option()
def compare_command(**values: Any) -> ExitCode:
    _check_output_files(values)
    _require_packages("numpy", *([] if values["json"] else ["rich"]), *(["matplotlib"] if values["plot"] else []))
    comparison = _compare(values)
    text = json.dumps(comparison.as_json(), indent=2)
    with ignore_broken_pipe():
        print(text) if values["json"] else print_comparison(comparison)
    if values["save"]:
        _write(values["save"], lambda path: Path(path).write_text(text + "\n"))
    if values["plot"]:
        _write(values["plot"], partial(draw, comparison))
    return ExitCode.SUCCESS


def _require_packages(*names: str) -> None:
    """Raise :exc:`~echo_async.StartError` unless the packages of the extra ``bench`` are installed."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise StartError(f"cannot import {name}: {error}; pip install 'echo-async[bench]'") from error


def _write(path: str, write: Callable[[str], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise EchoError(f"cannot write {path}: {describe_error(error)}") from error


def _check_output_files(values: dict[str, Any]) -> None:
    """Raise before minutes of measurements if their results could not be written."""
    plot = values["plot"]
    if plot and Path(plot).suffix not in SUFFIXES:
        raise ConfigError(f"invalid --plot: {plot!r} (must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]})")
    for name in ("save", "plot"):
        path = Path(values[name] or "result").absolute()
        if not path.parent.is_dir() or path.is_dir():
            raise ConfigError(f"invalid --{name}: {values[name]!r} (must be a file in an existing directory)")


def _compare(values: dict[str, Any]) -> Comparison:
    disturbance = None if values["disturb"] is None else Disturbance.parse(values["disturb"])
    if disturbance is not None and values["mode"] != "stream":
        raise ConfigError("--disturb requires --mode stream")
    names = ("pipeline", "mode", "duration", "warmup")
    connections = values["connections"] or (CONNECTIONS if disturbance is None else 1)
    plan = LoadPlan(connections=connections, **{name: values[name] for name in names})
    candidates = make_candidates(values["engines"], installed_loops(values["loops"]), values["chunk_sizes"])
    measurements = len(candidates) * len(values["sizes"]) * values["rounds"]
    with progress_bar(f"compare {len(candidates)} servers", measurements) as progress:
        return compare(candidates, values["sizes"], plan, values["rounds"], progress, disturbance)


def installed_loops(names: Sequence[str]) -> list[str]:
    """Replace ``auto`` by asyncio and uvloop; :exc:`~echo_async.StartError` if a loop cannot be used."""
    factories = {name: loop_factory(name) for name in ("asyncio", *names)}
    auto = ["asyncio"] if factories.get("auto") is factories["asyncio"] else ["asyncio", "uvloop"]
    return list(dict.fromkeys(each for name in names for each in (auto if name == "auto" else [name])))


def _make_plan(values: dict[str, Any]) -> LoadPlan:
    mode: LoadMode = values["mode"] or ("stream" if values["pipeline"] > 1 else "message")
    names = ("connections", "size", "pipeline", "duration", "warmup", "rate", "processes", "udp")
    options = {name: values[name] for name in names}
    timeout = values["timeout"] or (UDP_TIMEOUT if values["udp"] else CONNECT_TIMEOUT)
    if (tls := tls_arguments(values)) is not None:
        tls["server_hostname"] = tls_hostname(values["server_hostname"], values["host"], values["uds"])
    plan = LoadPlan(mode="stream" if values["udp"] else mode, tls=tls, timeout=timeout, **options)
    if plan.udp:
        _check_udp_options(values)
        return find_udp_server(plan, values["host"], values["port"])
    return find_server(plan, values["host"], values["port"], values["uds"])


def _check_udp_options(values: dict[str, Any]) -> None:
    refuse_conflicts(values, "udp", ("uds", "mode", *TLS_OPTIONS))
    if values["rate"] is not None and values["pipeline"] > 1:
        raise ConfigError("--udp --rate conflicts with --pipeline: datagrams are sent when they are due")
    if values["size"] > MAX_PAYLOAD_IPV4:
        raise ConfigError(f"invalid --size: {values['size']} (must be at most {MAX_PAYLOAD_IPV4} with --udp)")


def _report_load(result: LoadResult, expectations: Sequence[Expectation], as_json: bool) -> ExitCode:
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
    return ExitCode.SUCCESS if result.is_complete and not unmet else ExitCode.FAILURE


main = partial(run_command, command)
