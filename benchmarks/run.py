"""Compare the servers of this package with minimal servers in other languages and frameworks.

``python benchmarks/run.py`` measures every server in ``peers`` whose compiler, runtime or package is installed,
under several loads, in interleaved rounds (see ``echo_async.bench.comparison``). It writes ``results/DATE.json``
and ``results/DATE.md``. The servers in Python use the interpreter that runs this script. The loads ``flood`` and
``idle`` measure round trips beside a disturbance.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from echo_async.bench.comparison import Candidate, CandidateResult, Comparison, compare, make_candidates
from echo_async.bench.disturbance import Disturbance, max_idle_connections
from echo_async.bench.plan import LoadMode, LoadPlan
from echo_async.bench.plot import draw
from echo_async.bench.report import (
    format_comparison,
    format_disturbance,
    format_generator_limit,
    format_machine,
    format_spread,
    print_comparison,
    progress_bar,
)

HERE = Path(__file__).resolve().parent

IDLE_CONNECTIONS = 19_000


class Load(NamedTuple):
    """What is measured: the plan, the message size in bytes, and what disturbs the server meanwhile."""

    plan: LoadPlan
    size: int
    disturbance: Disturbance | None = None


def main() -> int:
    options = _parse_options()
    plan = LoadPlan(duration=options.duration, warmup=0.3)
    with tempfile.TemporaryDirectory() as build:
        candidates = [*_peer_candidates(Path(build)), *_own_candidates()]
        if options.only:
            candidates = [each for each in candidates if any(word in each.name for word in options.only)]
        if not candidates:
            print(
                f"error: invalid --only: {' '.join(options.only)} (must be part of the name of an installed server)",
                file=sys.stderr,
            )
            return 2
        comparisons: list[tuple[str, Comparison]] = []
        for name, load in _loads(plan).items():
            if name in options.loads:
                load = load._replace(size=options.size or load.size)
                comparisons.append((name, _measure(name, candidates, load, options.rounds)))
                print_comparison(comparisons[-1][1])
                # Written after each load, so that a later failure loses no results.
                _write_results(comparisons, Path(options.output))
        if options.plot:
            draw(comparisons[0][1], options.plot)
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(_loads(LoadPlan()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration", type=float, default=1.0, help="seconds of each result")
    parser.add_argument("--size", type=int, help="bytes per message, instead of those of each load")
    parser.add_argument("--loads", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="measure only servers with one of these words in the name"
    )
    parser.add_argument("--plot", help="draw a picture of the first load to this .svg, .png or .pdf file")
    parser.add_argument("--output", default=str(HERE / "results"), help="directory for the results")
    return parser.parse_args()


def _loads(plan: LoadPlan) -> dict[str, Load]:
    one_client = replace(plan, connections=1)
    return {
        "one": Load(plan, 1024),
        "pipelined": Load(replace(plan, pipeline=16), 1024),
        "large": Load(plan, 65_536),
        "large-pipelined": Load(replace(plan, pipeline=4), 65_536),
        "256k": Load(plan, 262_144),
        "1m": Load(plan, 1_048_576),
        "connections": Load(replace(plan, mode="message"), 1024),
        "flood": Load(one_client, 64, Disturbance()),
        "idle": Load(
            replace(one_client, warmup=2.0),  # the first checks of new connections take more time than later ones
            64,
            Disturbance(idle=min(IDLE_CONNECTIONS, max_idle_connections())),
        ),
    }


def _measure(name: str, candidates: Sequence[Candidate], load: Load, rounds: int) -> Comparison:
    with progress_bar(name, rounds * len(candidates)) as progress:
        return compare(candidates, [load.size], load.plan, rounds, progress, load.disturbance)


def _own_candidates() -> Iterator[Candidate]:
    yield from make_candidates(["protocol"], ["uvloop", "asyncio"], [1])
    yield from make_candidates(["streams"], ["uvloop", "asyncio"], [65_536])
    yield from make_candidates(["streams"], ["uvloop"], [20])
    yield from make_candidates(["threads"], [], [65_536, 20])


def _peer_candidates(build: Path) -> Iterator[Candidate]:
    """Return the installed peers; the first one, in C, is the base of the ratios."""
    yield from _compiled_peer("C epoll", "cc", ["-O2", "-o"], "epoll.c", build)
    yield from _compiled_peer("Go goroutines", "go", ["build", "-o"], "goroutines.go", build)
    if node := shutil.which("node"):
        yield _make_peer("Node net", node, HERE / "peers/node.js")
    yield from _python_peer("bare uvloop protocol", "uvloop", "protocol.py", lingering="protocol uvloop")
    yield from _python_peer("bare asyncio protocol", "asyncio", "protocol.py", "asyncio", lingering="protocol asyncio")
    yield from _python_peer("bare uvloop streams", "uvloop", "streams.py", lingering="streams uvloop")
    yield from _python_peer("bare asyncio streams", "asyncio", "streams.py", "asyncio", lingering="streams asyncio")
    yield from _python_peer("trio", "trio", "trio_streams.py")
    yield from _python_peer("Twisted", "twisted", "twisted_protocol.py")
    yield from _python_peer("gevent", "gevent", "gevent_stream.py")
    yield from _python_peer("bare threads 65536 B", "threading", "threads.py", "65536")
    yield from _python_peer("bare threads 20 B", "threading", "threads.py", lingering="threads")


def _compiled_peer(name: str, compiler: str, options: Sequence[str], source: str, build: Path) -> Iterator[Candidate]:
    if found := shutil.which(compiler):
        program = build / Path(source).stem
        subprocess.run([found, *options, program, HERE / "peers" / source], check=True)
        yield _make_peer(name, program)


def _python_peer(name: str, module: str, script: str, *arguments: str, lingering: str = "") -> Iterator[Candidate]:
    """Return a peer; with one connection per message, ``peers/lingering.py`` with these arguments if there are any."""
    if find_spec(module) is not None:
        closing = (sys.executable, HERE / "peers/lingering.py", *lingering.split()) if lingering else None
        yield _make_peer(name, sys.executable, HERE / "peers" / script, *arguments, closing=closing)


def _make_peer(name: str, *command: object, closing: Sequence[object] | None = None) -> Candidate:
    start: Callable[[LoadMode, int], Sequence[str]] = lambda mode, size: [  # noqa: E731
        str(word) for word in (closing if closing and mode == "message" else command)
    ]
    return Candidate(name=name, engine="peer", command=start)


def _write_results(comparisons: Sequence[tuple[str, Comparison]], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    machine = comparisons[0][1].machine
    path = directory / machine["date"].split()[0]
    path.with_suffix(".json").write_text(
        json.dumps({name: each.as_json() for name, each in comparisons}, indent=1) + "\n"
    )
    with ExitStack() as stack:
        out = stack.enter_context(path.with_suffix(".md").open("w"))
        command = shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])
        print(f"# Echo servers side by side\n\n{format_machine(machine)}. Measured by `{command}`.", file=out)
        for name, comparison in comparisons:
            [size] = comparison.sizes
            print(f"\n## `{name}`: {format_comparison(comparison, size)}\n", file=out)
            table = _markdown_table if comparison.disturbance is None else _disturbance_table
            print("\n".join(table(comparison.results_of_size(size))), file=out)
            if any(each.is_generator_limited for each in comparison.results):
                print(f"\n\\{format_generator_limit(comparison)}.", file=out)
    print(f"results written to {path}.json and {path}.md", file=sys.stderr)


def _markdown_table(results: Sequence[CandidateResult]) -> Iterator[str]:
    yield "| server | messages/s | CPU µs per message | CPU ratio (min-max) | p50 ms | p99 ms |"
    yield "|---|--:|--:|--:|--:|--:|"
    for result in sorted(results, key=lambda each: each.cpu_per_message or 0):
        limit = "*" if result.is_generator_limited else ""
        cpu_ratio = format_spread(result.ratio(results[0], "cpu_per_message"))
        yield (
            f"| {result.candidate.name} | {result.messages_per_second:,.0f}{limit} "
            f"| {1e6 * (result.cpu_per_message or 0):.1f} | {cpu_ratio} "
            f"| {1e3 * result.latency['50']:.3f} | {1e3 * result.latency['99']:.3f} |"
        )


def _disturbance_table(results: Sequence[CandidateResult]) -> Iterator[str]:
    last = "idle CPU %" if results[0].flood_rate is None else "flood MB/s"
    yield f"| server | p50 ms | p99 ms | p99 ratio (min-max) | max ms | {last} |"
    yield "|---|--:|--:|--:|--:|--:|"
    for result in sorted(results, key=lambda each: each.p99):
        times = (f"{1e3 * result.latency[percent]:.3f}" for percent in ("50", "99"))
        ratio, longest = format_spread(result.ratio(results[0], "p99")), f"{1e3 * result.longest:.1f}"
        row = (result.candidate.name, *times, ratio, longest, format_disturbance(result).strip())
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    sys.exit(main())
