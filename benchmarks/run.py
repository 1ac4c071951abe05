"""All the echo servers that can be run here, side by side: this package's, and peers as small as they go.

``python benchmarks/run.py`` measures every peer whose compiler, runtime or package is installed, in several
loads, in interleaved rounds (see ``echo_async.bench.comparison``), and writes ``results/DATE.json`` and
``results/DATE.md``. The peers in Python run on the Python that runs this.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from echo_async.bench.comparison import Candidate, CandidateResult, Comparison, compare, make_candidates, spread
from echo_async.bench.plan import LoadMode, LoadPlan
from echo_async.bench.report import format_comparison, format_machine, format_spread, print_comparison, progress_bar

HERE = Path(__file__).resolve().parent

Loads = dict[str, tuple[LoadPlan, int]]
"""A name, how the load is, and the bytes of a message."""


def main() -> int:
    options = _options()
    plan = LoadPlan(duration=options.duration, warmup=0.3)
    with tempfile.TemporaryDirectory() as build:
        candidates = [*_peers(Path(build)), *_ours()]
        if options.only:
            candidates = [each for each in candidates if any(word in each.name for word in options.only)]
        if not candidates:
            print(f"error: no server here is called {' or '.join(options.only)}", file=sys.stderr)
            return 2
        done: list[tuple[str, Comparison]] = []
        for name, (load, size) in _loads(plan).items():
            if name in options.loads:
                done.append((name, _measure(name, candidates, load, size, options.rounds)))
                print_comparison(done[-1][1])
                # Each time: a server that fails later on takes nothing of this with it.
                _write(done, options.rounds, Path(options.output))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(_loads(LoadPlan()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration", type=float, default=1.0, help="seconds of each result")
    parser.add_argument("--loads", nargs="+", choices=names, default=names)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="servers with one of these in the name")
    parser.add_argument("--output", default=str(HERE / "results"), help="the directory for the results")
    return parser.parse_args()


def _loads(plan: LoadPlan) -> Loads:
    return {
        "one": (plan, 1024),
        "pipelined": (replace(plan, pipeline=16), 1024),
        "large": (plan, 65_536),
        "connections": (replace(plan, mode="message"), 1024),
    }


def _measure(name: str, candidates: Sequence[Candidate], plan: LoadPlan, size: int, rounds: int) -> Comparison:
    with progress_bar(name, rounds * len(candidates)) as progress:
        return compare(candidates, [size], plan, rounds, progress)


def _ours() -> Iterator[Candidate]:
    yield from make_candidates(["protocol"], ["uvloop", "asyncio"], [1])
    yield from make_candidates(["streams"], ["uvloop", "asyncio"], [65_536])
    yield from make_candidates(["streams"], ["uvloop"], [20])
    yield from make_candidates(["threads"], [], [65_536, 20])


def _peers(build: Path) -> Iterator[Candidate]:
    """Those that can be run here, the one in C first: it is the base of the ratios."""
    yield from _compiled("C epoll", "cc", ["-O2", "-o"], "epoll.c", build)
    yield from _compiled("Go goroutines", "go", ["build", "-o"], "goroutines.go", build)
    if node := shutil.which("node"):
        yield _peer("Node net", node, HERE / "peers/node.js")
    yield from _python("bare uvloop protocol", "uvloop", "uvloop_protocol.py")
    yield from _python("bare uvloop streams", "uvloop", "streams.py")
    yield from _python("bare asyncio streams", "asyncio", "streams.py", "asyncio")
    yield from _python("trio", "trio", "trio_streams.py")
    yield from _python("Twisted", "twisted", "twisted_protocol.py")
    yield from _python("gevent", "gevent", "gevent_stream.py")
    yield from _python("bare threads 65536 B", "threading", "threads.py", "65536")
    yield from _python("bare threads 20 B", "threading", "threads.py")


def _compiled(name: str, compiler: str, options: Sequence[str], source: str, build: Path) -> Iterator[Candidate]:
    if found := shutil.which(compiler):
        program = build / Path(source).stem
        subprocess.run([found, *options, program, HERE / "peers" / source], check=True)
        yield _peer(name, program)


def _python(name: str, module: str, script: str, *arguments: str) -> Iterator[Candidate]:
    if find_spec(module) is not None:
        yield _peer(name, sys.executable, HERE / "peers" / script, *arguments)


def _peer(name: str, *command: object) -> Candidate:
    start: Callable[[LoadMode, int], Sequence[str]] = lambda mode, size: [str(word) for word in command]  # noqa: E731
    return Candidate(name=name, engine="peer", command=start)


def _write(done: Sequence[tuple[str, Comparison]], rounds: int, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    machine = done[0][1].machine
    path = directory / machine["date"].split()[0]
    path.with_suffix(".json").write_text(json.dumps({name: each.as_json() for name, each in done}, indent=1) + "\n")
    with ExitStack() as stack:
        out = stack.enter_context(path.with_suffix(".md").open("w"))
        command = f"python benchmarks/run.py --rounds {rounds} --duration {done[0][1].plan.duration:g}"
        print(f"# Echo servers side by side\n\n{format_machine(machine)}. Measured by `{command}`.", file=out)
        for name, comparison in done:
            [size] = comparison.sizes
            print(f"\n## `{name}`: {format_comparison(comparison, size)}\n", file=out)
            print("\n".join(_markdown(comparison.results_of_size(size))), file=out)
    print(f"written: {path}.json and {path}.md", file=sys.stderr)


def _markdown(results: Sequence[CandidateResult]) -> Iterator[str]:
    yield "| server | messages/s | CPU µs a message | CPU ratio (least-greatest) | p50 ms | p99 ms |"
    yield "|---|--:|--:|--:|--:|--:|"
    for result in sorted(results, key=lambda each: each.cpu_per_message or 0):
        limit = "*" if result.is_generator_limited else ""
        yield (
            f"| {result.candidate.name} | {result.messages_per_second:,.0f}{limit} "
            f"| {1e6 * (result.cpu_per_message or 0):.1f} | {format_spread(spread(result.cpu_ratios(results[0])))} "
            f"| {1e3 * result.latency['50']:.3f} | {1e3 * result.latency['99']:.3f} |"
        )
    if any(each.is_generator_limited for each in results):
        yield "\n\\* the load generator was the limit: the server can do more; its CPU time a message holds."


if __name__ == "__main__":
    sys.exit(main())
