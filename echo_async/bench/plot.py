"""A picture of a comparison, to be understood at a glance. Colors stand for engines, in every part of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from typing import TYPE_CHECKING, Any, Literal

from .comparison import PLOT_PERCENTILES, CandidateResult, Comparison
from .report import describe_comparison, describe_machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PICTURES", "draw"]

PICTURES = (".svg", ".png", ".pdf")

COLORS = {"threads": "#c1554d", "streams": "#3b73b9", "protocol": "#3d9970"}
OTHERS = ("#8a63a8", "#b9813b", "#5b6770", "#3ba7b9", "#a83b78")
DASHES = {"asyncio": "--"}  # what else there is has full lines
FAINT = "#d8dce0"


def draw(comparison: Comparison, path: str) -> None:
    """Write the picture of the first message size to ``path``."""
    from matplotlib.figure import Figure

    results = comparison.of_size(comparison.sizes[0])
    chunked = [each for each in results if each.candidate.chunk_size is not None]
    figure = Figure(figsize=(12, 2.6 + 0.28 * len(results) + 3.6), layout="constrained")
    figure.suptitle(f"What an echo costs: {describe_comparison(comparison, results[0].size)}", fontsize=12.5)
    figure.supxlabel(describe_machine(comparison.machine), fontsize=7.5, color="#666666")
    (rates, cpu), (latency, chunks) = figure.subplots(
        2, 2, height_ratios=(0.28 * len(results) + 0.6, 3.6), gridspec_kw={"hspace": 0.08}
    )
    _draw_bars(
        rates,
        results,
        [each.messages_per_second / 1e3 for each in results],
        "thousand messages a second",
        "more",
    )
    used = [1e6 * (each.cpu_per_message or 0) for each in results]
    _draw_bars(cpu, results, used, "CPU time of the server, µs a message", "less")
    cpu.set_yticklabels([])
    _draw_latency(latency, _ends(results))
    _draw_chunks(chunks, chunked, [each for each in results if each.candidate.chunk_size is None])
    figure.savefig(path, dpi=150)


def color(result: CandidateResult) -> str:
    engine = result.candidate.engine
    return COLORS.get(engine) or OTHERS[sum(engine.encode()) % len(OTHERS)]


def _shade(result: CandidateResult) -> str:
    """The color of its engine, lighter on asyncio's own event loop."""
    if result.candidate.loop != "asyncio":
        return color(result)
    parts = (int(color(result)[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{(part + 255) // 2:02x}" for part in parts)


def _draw_bars(
    axes: Axes, results: Sequence[CandidateResult], values: Sequence[float], title: str, better: str
) -> None:
    places = range(len(results))
    bars = axes.barh(places, values, color=[_shade(each) for each in results], height=0.72)
    axes.bar_label(bars, [f"{value:,.1f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(places, [each.candidate.name for each in results], fontsize=9)
    axes.invert_yaxis()
    axes.set_title(f"{title} ({better} is better)", fontsize=10, loc="left")
    axes.margins(x=0.12)
    _plain(axes, "x")


def _ends(results: Sequence[CandidateResult]) -> list[CandidateResult]:
    """Of each engine and loop, the first and the last: the smallest and the greatest chunks."""
    groups = _by_line(results).values()
    return [each for group in groups for each in (group if len(group) == 1 else (group[0], group[-1]))]


def _by_line(results: Sequence[CandidateResult]) -> dict[tuple[str, str | None], list[CandidateResult]]:
    """By engine and loop, in the order of chunk sizes."""
    lines: dict[tuple[str, str | None], list[CandidateResult]] = {}
    for result in sorted(results, key=lambda each: each.candidate.chunk_size or 0):
        lines.setdefault((result.candidate.engine, result.candidate.loop), []).append(result)
    return lines


def _draw_latency(axes: Axes, results: Sequence[CandidateResult]) -> None:
    """Each percentile at its number of nines, so that the slow few are as wide as the many."""
    for result in results:
        drawn = [percent for percent in PLOT_PERCENTILES if float(percent) >= 10]
        values = [1e3 * result.curve[percent] for percent in drawn]
        small = result.candidate.chunk_size is not None and result.candidate.chunk_size < 1024
        axes.plot(
            [_nines(percent) for percent in drawn],
            values,
            color=color(result),
            linestyle=DASHES.get(result.candidate.loop or "", "-"),
            linewidth=1.0 if small else 2.0,
            alpha=0.7 if small else 1.0,
            label=result.candidate.name,
        )
    ticks = ("50", "90", "99", "99.9", "99.99")
    axes.set_xticks([_nines(tick) for tick in ticks], [f"{tick} %" for tick in ticks])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("milliseconds within which so many replies are there", fontsize=10, loc="left")
    axes.legend(fontsize=7, frameon=False, ncols=2)
    _plain(axes, "y")


def _nines(percent: str) -> float:
    return -log10(1 - float(percent) / 100)


def _draw_chunks(axes: Axes, results: Sequence[CandidateResult], without: Sequence[CandidateResult]) -> None:
    """Throughput against chunk size; engines that read no chunks are level lines."""
    for (engine, loop), group in _by_line(results).items():
        axes.plot(
            [each.candidate.chunk_size or 0 for each in group],
            [each.messages_per_second / 1e3 for each in group],
            color=color(group[0]),
            linestyle=DASHES.get(loop or "", "-"),
            marker="o",
            label=" ".join(filter(None, (engine, loop))),
        )
    for result in without:
        style: dict[str, Any] = {
            "color": color(result),
            "linestyle": DASHES.get(result.candidate.loop or "", "-"),
        }
        axes.axhline(result.messages_per_second / 1e3, label=result.candidate.name, linewidth=1, **style)
    axes.set_xscale("log")
    ticks = sorted({each.candidate.chunk_size or 0 for each in results})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title("thousand messages a second, by bytes asked for at each read", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    _plain(axes, "y")


def _plain(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
