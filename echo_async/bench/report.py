"""The results as tables, with times in milliseconds, and as JSON, with times in seconds."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..net import format_address
from .comparison import CandidateResult, Comparison, RoundFigure
from .disturbance import Disturbance
from .expectation import Expectation
from .plan import LoadPlan
from .result import PERCENTILES, Distribution, LoadResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RATIO_LEGEND = (
    "ratio: to the first line, of measurements in the same round; median of the rounds (min-max), so it can differ "
    "from that of the columns"
)
SPREAD_ADVICE = "compare on an idle machine, with a longer --duration or more --rounds"
MAX_SPREAD = 2.0  # the largest ratio of a server, divided by its smallest
MIN_WIDTH = 112  # columns of a table: in a narrower terminal lines wrap, and no figure is cut off


def load_json(result: LoadResult, expectations: Sequence[Expectation]) -> dict[str, Any]:
    plan = result.plan
    return {
        "address": format_address(plan.address),
        "model": "closed" if plan.rate is None else "open",
        "mode": None if plan.udp else plan.mode,
        **{name: getattr(plan, name) for name in ("connections", "size", "pipeline", "processes", "rate")},
        "tls": plan.tls is not None,
        "udp": plan.udp,
        "warmup": plan.warmup,
        "duration": result.seconds,
        "interrupted": result.interrupted,
        "messages": result.messages,
        "messages_per_second": result.messages_per_second,
        "megabytes_per_second": result.megabytes_per_second,
        "response_time": None if result.response is None else result.response.as_json(),
        "service_time": result.service.as_json(),
        "late": result.late,
        "late_by_generator": result.late_by_generator,
        "lost": result.lost,
        "lost_share": result.lost_share,
        "duplicated": result.duplicated,
        "failures": dict(result.failures),
        "mismatch": result.mismatch,
        "generator_cpu": result.generator_cpu,
        "generator_was_the_limit": result.is_generator_limited,
        "expectations": [
            {"expect": each.text, "value": each.value(result), "met": each.is_met(result)} for each in expectations
        ],
    }


def print_load(result: LoadResult, expectations: Sequence[Expectation]) -> None:
    console = _make_console()
    console.print(format_load(result.plan))
    console.print(_load_table(result))
    for remark in _remarks(result):
        console.print(remark)
    for each in expectations:
        met = "met" if each.is_met(result) else "NOT met"
        console.print(f"expectation {each.text}: {met}, measured {each.format_value(result)}")


def _load_table(result: LoadResult) -> Table:
    table = _make_table(["messages/s", "MB/s", "", *(f"p{percent} ms" for percent in PERCENTILES), "max ms"], "")
    rates = [format_number(result.messages_per_second), f"{result.megabytes_per_second:,.1f}"]
    if result.response is not None:
        table.add_row(*rates, "response time", *_format_times(result.response))
        rates = ["", ""]
    table.add_row(*rates, "service time", *_format_times(result.service))
    return table


def _format_times(times: Distribution) -> Iterator[str]:
    values = [*(times.percentile(percent) for percent in PERCENTILES), times.max]
    return (f"{1e3 * value:,.3f}" for value in values)


def format_load(plan: LoadPlan) -> str:
    per_connection = (
        "one message per connection" if plan.mode == "message" else f"up to {plan.pipeline} in flight on each"
    )
    if plan.udp and plan.rate is not None:
        per_connection = "any number in flight"
    model = "closed loop" if plan.rate is None else f"open loop at {plan.rate:,g} messages/s"
    protocol = ", UDP" if plan.udp else ", TLS" if plan.tls is not None else ""
    connections = format_count(plan.connections, "socket" if plan.udp else "connection")
    return (
        f"{format_address(plan.address)}{protocol}: {connections}, {per_connection}, "
        f"{format_count(plan.size, 'byte')} per message, {model}"
    )


def _remarks(result: LoadResult) -> Iterator[str]:
    """Yield what the reader has to know about the figures."""
    plan = result.plan
    if plan.rate is None:
        yield "closed loop: a pause of the server also pauses the load; use --rate for the latency that clients see"
    else:
        yield (
            f"sent late (over 1 ms): {format_number(result.late)} of {format_number(result.service.count)}, "
            f"{format_number(result.late_by_generator)} of them because of the load generator; "
            "response time counts from the due time"
        )
    if result.is_generator_limited:
        used = ", ".join(f"{100 * each:.0f} %" for each in result.generator_cpu)
        yield (
            f"the load generator was the limit, not the server (it used {used} of a core): "
            f"use --processes {2 * plan.processes}, or a machine that is idle"
        )
    if result.interrupted:
        yield f"interrupted after {result.seconds:.3g} of {plan.duration:g} s"
    for reason, times in result.failures.items():
        yield f"failed: {reason} ({format_count(times, 'time')})"
    if result.lost:
        yield f"lost: {format_count(result.lost, 'message')} ({100 * result.lost_share:.3g} %)"
    if result.duplicated:
        yield f"duplicated: {format_count(result.duplicated, 'datagram')}"
    if any("between replies" in reason for reason in result.failures):
        yield "a server that closes after each reply requires --mode message"


def print_comparison(comparison: Comparison) -> None:
    console = _make_console()
    console.print(format_machine(comparison.machine))
    for size in comparison.sizes:
        results = comparison.results_of_size(size)
        console.print(f"\n{format_comparison(comparison, size)}")
        console.print(_comparison_table(results) if comparison.disturbance is None else _disturbance_table(results))
        if any(each.is_generator_limited for each in results):
            console.print(format_generator_limit(comparison))
    console.print(f"{RATIO_LEGEND}; {_format_legend(comparison)}")
    if unsteady := ", ".join(find_unsteady(comparison)):
        console.print(f"spread too large: {unsteady}; {SPREAD_ADVICE}")


def find_unsteady(comparison: Comparison) -> list[str]:
    """Return the servers whose ratio differs too much from round to round to be relied on."""
    figures: list[RoundFigure] = ["messages_per_second", "cpu_per_message"]
    if comparison.disturbance is not None:
        figures = ["p99"]
    names: dict[str, None] = {}
    for size in comparison.sizes:
        base, *others = comparison.results_of_size(size)
        spreads = ((each, each.ratio(base, figure)) for each in others for figure in figures)
        names |= {each.candidate.name: None for each, found in spreads if found and _is_unsteady(found)}
    return list(names)


def _is_unsteady(ratios: dict[str, float]) -> bool:
    return ratios["max"] > MAX_SPREAD * ratios["min"]


def format_generator_limit(comparison: Comparison) -> str:
    """Return what the asterisk in a table means."""
    if comparison.disturbance is None:
        return "* the load generator was the limit: the server can do more; compare its CPU time per message"
    return "* the flooding client was the limit: the server can do more"


def _format_legend(comparison: Comparison) -> str:
    if comparison.disturbance is None:
        return "CPU µs: of the server, per message"
    other = "idle CPU %: of a core, before the round trips" if comparison.disturbance.idle else "MB/s: of the flood"
    return f"p99: of round trips, with its ratio; max: of all rounds; {other}"


def _disturbance_table(results: Sequence[CandidateResult]) -> Table:
    last = "idle CPU %" if results[0].flood_rate is None else "flood MB/s"
    table = _make_table(["server", "p50 ms", "p99 ms", "ratio", "max ms", last], "server")
    for result in results:
        table.add_row(
            result.candidate.name,
            *(f"{1e3 * result.latency[percent]:,.3f}" for percent in ("50", "99")),
            format_spread(result.ratio(results[0], "p99")),
            f"{1e3 * result.longest:,.3f}",
            format_disturbance(result),
        )
    return table


def format_disturbance(result: CandidateResult) -> str:
    """Return the rate of the flood in MB/s, or the CPU time with idle connections in percent of a core."""
    if result.flood_rate is not None:
        return f"{result.flood_rate / 1e6:,.1f}" + ("*" if result.is_generator_limited else " ")
    return "" if result.idle_cpu is None else f"{100 * result.idle_cpu:.1f}"


def _comparison_table(results: Sequence[CandidateResult]) -> Table:
    table = _make_table(["server", "messages/s", "ratio", "CPU µs", "ratio", "p50 ms", "p99 ms"], "server")
    for result in results:
        cpu = result.cpu_per_message
        table.add_row(
            result.candidate.name,
            format_number(result.messages_per_second) + ("*" if result.is_generator_limited else " "),
            format_spread(result.ratio(results[0], "messages_per_second")),
            "" if cpu is None else f"{1e6 * cpu:,.1f}",
            format_spread(result.ratio(results[0], "cpu_per_message")),
            *(f"{1e3 * result.latency[percent]:,.3f}" for percent in ("50", "99")),
        )
    return table


def format_spread(ratios: dict[str, float] | None) -> str:
    return "" if ratios is None else "{median:.2f} ({min:.2f}-{max:.2f})".format(**ratios)


def format_machine(machine: dict[str, Any]) -> str:
    uvloop = f", uvloop {machine['uvloop']}" if machine["uvloop"] else ""
    return (
        f"{machine['date']}: {machine['python']}{uvloop}, echo-async {machine['echo_async']}; "
        f"{machine['cpus']} CPUs ({machine['processor']}), {machine['memory_gib']} GiB; {machine['system']}"
    )


def format_comparison(comparison: Comparison, size: int) -> str:
    plan = comparison.plan
    per_connection = "one message per connection" if plan.mode == "message" else f"{plan.pipeline} in flight on each"
    rounds = len(comparison.results[0].rounds)
    return (
        f"{format_count(size, 'byte')} per message, {format_count(plan.connections, 'connection')}, {per_connection}"
        f"{_format_disturbance(comparison.disturbance)}; {format_count(rounds, 'round')} of {plan.duration:g} s"
    )


def _format_disturbance(disturbance: Disturbance | None) -> str:
    if disturbance is None:
        return ""
    return f" beside {format_count(disturbance.idle, 'idle connection')}" if disturbance.idle else " beside a flood"


def format_number(number: float) -> str:
    return f"{number:,.0f}"


def format_count(number: float, noun: str) -> str:
    """Return ``1 round`` or ``2 rounds``."""
    return f"{format_number(number)} {noun}{'' if number == 1 else 's'}"


def _make_table(columns: Sequence[str], left_aligned: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name == left_aligned else "right", no_wrap=True)
    return table


def _make_console() -> Console:
    from rich.console import Console

    width = max(MIN_WIDTH, shutil.get_terminal_size().columns)
    return Console(width=width, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(description: str, total: float) -> Iterator[Callable[[float], None] | None]:
    """Show a bar if stderr is a terminal; yield the function that advances it."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=min(done, total), refresh=True)
