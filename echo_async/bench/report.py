"""What a person reads, with times in milliseconds; and the same facts as JSON, in seconds."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..net import format_address
from .comparison import CandidateResult, Comparison, spread
from .distribution import PERCENTILES, Distribution
from .expectation import Expectation
from .load import LoadResult
from .plan import LoadPlan

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "console",
    "count",
    "describe",
    "describe_comparison",
    "describe_machine",
    "load_json",
    "print_comparison",
    "print_load",
    "progress_bar",
    "show_spread",
]

WIDTH = 112  # of a table, at least: a narrower terminal breaks lines, which is better than figures cut off


def load_json(result: LoadResult, expectations: Sequence[Expectation]) -> dict[str, Any]:
    """Everything that a load found."""
    plan = result.plan
    return {
        "address": format_address(plan.address),
        "model": "closed" if plan.rate is None else "open",
        "mode": plan.mode,
        "connections": plan.connections,
        "size": plan.size,
        "pipeline": plan.pipeline,
        "processes": plan.processes,
        "rate": plan.rate,
        "tls": plan.tls is not None,
        "warmup": plan.warmup,
        "duration": result.seconds,
        "interrupted": result.interrupted,
        "messages": result.messages,
        "messages_per_second": result.messages_per_second,
        "megabytes_per_second": result.megabytes_per_second,
        "response_time": None if result.response is None else result.response.as_json(),
        "service_time": result.service.as_json(),
        "late": result.late,
        "late_by_generator": result.behind,
        "lost": result.lost,
        "failures": dict(result.failures),
        "mismatch": result.mismatch,
        "generator_cpu": result.generator_cpu,
        "generator_was_the_limit": result.generator_was_the_limit,
        "expectations": [
            {"expect": each.text, "value": each.value(result), "met": each.holds(result)} for each in expectations
        ],
    }


def print_load(result: LoadResult, expectations: Sequence[Expectation]) -> None:
    out = console()
    out.print(describe(result.plan))
    out.print(_load_table(result))
    for line in _remarks(result):
        out.print(line)
    for each in expectations:
        out.print(f"expected {each.text}: {'met' if each.holds(result) else 'NOT met'}, it is {each.shown(result)}")


def _load_table(result: LoadResult) -> object:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    columns = ["messages/s", "MB/s", "", *(f"p{percent} ms" for percent in PERCENTILES), "max ms"]
    for name in columns:
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    rates = [count(result.messages_per_second), f"{result.megabytes_per_second:,.1f}"]
    if result.response is not None:
        table.add_row(*rates, "response time", *_times(result.response))
        rates = ["", ""]
    table.add_row(*rates, "service time", *_times(result.service))
    return table


def _times(times: Distribution) -> Iterator[str]:
    values = [*(times.percentile(percent) for percent in PERCENTILES), times.max]
    return (f"{1e3 * value:,.3f}" for value in values)


def describe(plan: LoadPlan) -> str:
    """The load in one line."""
    where = format_address(plan.address)
    each = "a connection a message" if plan.mode == "message" else f"up to {plan.pipeline} in flight on each"
    model = "closed loop" if plan.rate is None else f"open loop at {plan.rate:,g} messages/s"
    tls = ", TLS" if plan.tls is not None else ""
    return f"{where}{tls}: {many(plan.connections, 'connection')}, {each}, {many(plan.size, 'byte')} a message, {model}"


def _remarks(result: LoadResult) -> Iterator[str]:
    """What is to be known about the figures."""
    plan = result.plan
    if plan.rate is None:
        yield "closed loop: a pause of the server holds back the load as well; --rate shows what clients would see"
    else:
        yield (
            f"sent late (over 1 ms): {count(result.late)} of {count(result.service.count)}, "
            f"{count(result.behind)} of them because of the generator; response time counts from the moment due"
        )
    if result.generator_was_the_limit:
        used = ", ".join(f"{100 * each:.0f} %" for each in result.generator_cpu)
        yield (
            f"the generator was the limit, not the server (it used {used} of a core): "
            f"try --processes {2 * plan.processes}, or a machine that is not busy"
        )
    if result.interrupted:
        yield f"interrupted after {result.seconds:.3g} s of {plan.duration:g}"
    for why, times in result.failures.items():
        yield f"failed: {why} ({many(times, 'time')})"
    if result.lost:
        yield f"lost: {many(result.lost, 'message')}"
    if any("between replies" in why for why in result.failures):
        yield "a server that closes after each reply needs --mode message"


def print_comparison(comparison: Comparison) -> None:
    out = console()
    out.print(describe_machine(comparison.machine))
    for size in comparison.sizes:
        results = comparison.of_size(size)
        out.print(f"\n{describe_comparison(comparison, size)}")
        out.print(_comparison_table(results))
        if any(result.generator_was_the_limit for result in results):
            out.print("* the load generator was the limit: the server can do more; its CPU time a message holds")
    out.print(
        "ratios are to the first line: median of the rounds (least-greatest); CPU: what the server uses a message"
    )


def _comparison_table(results: Sequence[CandidateResult]) -> object:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name in ("model", "messages/s", "ratio", "CPU µs", "ratio", "p50 ms", "p99 ms"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for result in results:
        cpu = result.cpu_per_message
        table.add_row(
            result.candidate.name,
            count(result.messages_per_second) + ("*" if result.generator_was_the_limit else " "),
            show_spread(spread(result.rate_ratios(results[0]))),
            "" if cpu is None else f"{1e6 * cpu:,.1f}",
            show_spread(spread(result.cpu_ratios(results[0]))),
            *(f"{1e3 * result.curve[percent]:,.3f}" for percent in ("50", "99")),
        )
    return table


def show_spread(ratios: dict[str, float] | None) -> str:
    return "" if ratios is None else "{median:.2f} ({min:.2f}-{max:.2f})".format(**ratios)


def describe_machine(machine: dict[str, Any]) -> str:
    uvloop = f", uvloop {machine['uvloop']}" if machine["uvloop"] else ""
    return (
        f"{machine['date']}: {machine['python']}{uvloop}, echo-async {machine['echo_async']}; "
        f"{machine['cpus']} CPUs ({machine['processor']}), {machine['memory_gib']} GiB; {machine['system']}"
    )


def describe_comparison(comparison: Comparison, size: int) -> str:
    plan = comparison.plan
    each = "a connection a message" if plan.mode == "message" else f"{plan.pipeline} in flight on each"
    rounds = len(comparison.results[0].rounds)
    return (
        f"{many(size, 'byte')} a message, {many(plan.connections, 'connection')}, {each}; "
        f"{many(rounds, 'round')} of {plan.duration:g} s"
    )


def count(number: float) -> str:
    return f"{number:,.0f}"


def many(number: float, what: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{count(number)} {what}{'' if number == 1 else 's'}"


def console() -> Console:
    """What writes to stdout; without colors where that is not a terminal."""
    from rich.console import Console

    return Console(width=max(WIDTH, shutil.get_terminal_size().columns), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(what: str, total: float) -> Iterator[Callable[[float], None] | None]:
    """A bar on stderr if that is a terminal: gives what to call with how much is done."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(what, total=total)

        def show(done: float) -> None:
            bar.update(task, completed=min(done, total), refresh=True)

        yield show
