"""The picture of a comparison: throughput, CPU time, latency and chunk size. Each engine has one color.

Beside a disturbance it shows the latency, and the rate of the flood or the CPU time of the idle server.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from typing import TYPE_CHECKING, Any, Literal

from .comparison import LATENCY_PERCENTILES, Candidate, CandidateResult, Comparison
from .report import format_comparison, format_machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")
ENGINE_COLORS = {"threads": "#c1554d", "streams": "#3b73b9", "protocol": "#3d9970", "peer": "#8a8f98"}
GRID_COLOR = "#d8dce0"


def draw(comparison: Comparison, path: str) -> None:
    """Write the picture of the first message size to ``path``."""
    from matplotlib.figure import Figure

    results = comparison.results_of_size(comparison.sizes[0])
    bars_height = 0.28 * len(results) + 0.6
    figure = Figure(layout="constrained")
    figure.suptitle(f"Echo servers: {format_comparison(comparison, results[0].size)}", fontsize=12.5)
    figure.supxlabel(format_machine(comparison.machine), fontsize=7.5, color="#666666")
    if comparison.disturbance is None:
        figure.set_size_inches(12, bars_height + 5.6)
        _draw_loads(figure, results, bars_height)
    else:
        figure.set_size_inches(12, bars_height + 1.2)
        _draw_disturbed(figure, sorted(results, key=lambda each: each.p99))
    figure.savefig(path, dpi=150)


def _draw_loads(figure: Figure, results: Sequence[CandidateResult], bars_height: float) -> None:
    (rates, cpu), (latency, chunks) = figure.subplots(
        2, 2, height_ratios=(bars_height, 3.6), gridspec_kw={"hspace": 0.08}
    )
    thousands = [each.messages_per_second / 1e3 for each in results]
    _draw_bars(rates, results, thousands, "thousand messages per second (more is better)")
    microseconds = [1e6 * (each.cpu_per_message or 0) for each in results]
    _draw_bars(cpu, results, microseconds, "CPU time of the server, µs per message (less is better)")
    cpu.set_yticklabels([])
    _draw_latency(latency, _extreme_chunk_sizes(results))
    _draw_chunk_sizes(chunks, results)


def _draw_disturbed(figure: Figure, results: Sequence[CandidateResult]) -> None:
    tails, served = figure.subplots(1, 2, width_ratios=(3, 2))
    milliseconds = [1e3 * each.p99 for each in results]
    _draw_bars(tails, results, milliseconds, "round trip in milliseconds: p50 (|), p99 (bar) and longest (x)", ".2f")
    tails.set_xscale("log")
    tails.xaxis.set_major_formatter("{x:g}")
    positions = range(len(results))
    tails.plot([1e3 * each.latency["50"] for each in results], positions, "|", color="#222222", markersize=9)
    tails.plot([1e3 * each.longest for each in results], positions, "x", color="#222222", markersize=4)
    if results[0].flood_rate is None:
        shares = [100 * (each.idle_cpu or 0) for each in results]
        _draw_bars(served, results, shares, "CPU time of the idle server, % of a core (less is better)")
    else:
        rates = [(each.flood_rate or 0) / 1e6 for each in results]
        _draw_bars(served, results, rates, "rate of the flood, MB/s (more is better)")
    served.set_yticklabels([])


def _bar_color(candidate: Candidate) -> str:
    """Return the color of the engine, lighter on asyncio's own event loop."""
    color = ENGINE_COLORS[candidate.engine]
    if candidate.loop != "asyncio":
        return color
    parts = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{(part + 255) // 2:02x}" for part in parts)


def _line_style(candidate: Candidate) -> dict[str, Any]:
    return {"color": ENGINE_COLORS[candidate.engine], "linestyle": "--" if candidate.loop == "asyncio" else "-"}


def _draw_bars(
    axes: Axes, results: Sequence[CandidateResult], values: Sequence[float], title: str, number_format: str = ",.1f"
) -> None:
    positions = range(len(results))
    bars = axes.barh(positions, values, color=[_bar_color(each.candidate) for each in results], height=0.72)
    axes.bar_label(bars, [format(value, number_format) for value in values], padding=3, fontsize=8)
    axes.set_yticks(positions, [each.candidate.name for each in results], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    _finish_axes(axes, title, "x")


def _group_by_line(results: Sequence[CandidateResult]) -> list[list[CandidateResult]]:
    """Group the results by engine and loop, in the order of their chunk sizes."""
    groups: dict[tuple[str, str | None], list[CandidateResult]] = {}
    for result in sorted(results, key=lambda each: each.candidate.chunk_size or 0):
        groups.setdefault((result.candidate.engine, result.candidate.loop), []).append(result)
    return list(groups.values())


def _extreme_chunk_sizes(results: Sequence[CandidateResult]) -> list[CandidateResult]:
    """Return the results with the smallest and the largest chunk size of each engine and loop."""
    return [each for group in _group_by_line(results) for each in (group if len(group) == 1 else (group[0], group[-1]))]


def _draw_latency(axes: Axes, results: Sequence[CandidateResult]) -> None:
    """Draw each percentile at its number of nines, so that the slowest messages are visible."""
    percentiles = [percent for percent in LATENCY_PERCENTILES if 10 <= float(percent) < 100]
    for result in results:
        is_small = result.candidate.chunk_size is not None and result.candidate.chunk_size < 1024
        axes.plot(
            [_position_of_percentile(percent) for percent in percentiles],
            [1e3 * result.latency[percent] for percent in percentiles],
            linewidth=1.0 if is_small else 2.0,
            alpha=0.7 if is_small else 1.0,
            label=result.candidate.name,
            **_line_style(result.candidate),
        )
    ticks = ("50", "90", "99", "99.9", "99.99")
    axes.set_xticks([_position_of_percentile(tick) for tick in ticks], [f"{tick} %" for tick in ticks])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=7, frameon=False, ncols=2)
    _finish_axes(axes, "latency in milliseconds, by percentile", "y")


def _position_of_percentile(percent: str) -> float:
    return -log10(1 - float(percent) / 100)


def _draw_chunk_sizes(axes: Axes, results: Sequence[CandidateResult]) -> None:
    """Draw the throughput by chunk size; engines that ignore the chunk size are horizontal lines."""
    chunked = [each for each in results if each.candidate.chunk_size is not None]
    for group in _group_by_line(chunked):
        candidate = group[0].candidate
        axes.plot(
            [each.candidate.chunk_size or 0 for each in group],
            [each.messages_per_second / 1e3 for each in group],
            marker="o",
            label=" ".join(filter(None, (candidate.engine, candidate.loop))),
            **_line_style(candidate),
        )
    for each in results:
        if each.candidate.chunk_size is None:
            style = _line_style(each.candidate)
            axes.axhline(each.messages_per_second / 1e3, label=each.candidate.name, linewidth=1, **style)
    axes.set_xscale("log")
    ticks = sorted({each.candidate.chunk_size or 0 for each in chunked})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    _finish_axes(axes, "thousand messages per second, by chunk size in bytes", "y")


def _finish_axes(axes: Axes, title: str, grid: Literal["x", "y"]) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis=grid, color=GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
