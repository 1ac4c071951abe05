"""Servers compared side by side: each round starts, loads and stops every candidate once.

The speed of a machine changes from minute to minute. Interleaved rounds compare what was measured within
seconds: each round has its own ratio, and the spread of the ratios shows how reliable their median is. On a busy
machine the CPU time per message is the most reliable figure. The first candidate is the base of the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, Literal

from ..config import EngineName
from ..errors import EchoError
from .load import find_server, run_load
from .machine import machine_info, separate_cpus
from .plan import LoadMode, LoadPlan
from .server import ServerProcess, server_command

LATENCY_PERCENTILES = ("0", "1", "5", *map(str, range(10, 100, 10)), "95", "98", "99", "99.5", "99.9", "99.99")
UNLIMITED_CHUNK_SIZE = 2**16  # bytes
RoundFigure = Literal["messages_per_second", "cpu_per_message"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A server with its options. ``command`` returns what starts it, given the mode and the message size."""

    name: str
    engine: str
    loop: str | None = None
    """None for threads."""
    chunk_size: int | None = None
    """None for engines that ignore it."""
    command: Callable[[LoadMode, int], Sequence[str]]


@dataclass
class Round:
    """One load on one server; times in seconds."""

    messages_per_second: float
    cpu_per_message: float | None
    latency: dict[str, float]
    """Percentiles."""
    is_generator_limited: bool


@dataclass
class CandidateResult:
    """The rounds of one candidate with one message size, and their medians."""

    candidate: Candidate
    size: int
    rounds: list[Round] = field(default_factory=list)

    @property
    def messages_per_second(self) -> float:
        return median(each.messages_per_second for each in self.rounds)

    @property
    def cpu_per_message(self) -> float | None:
        used = [each.cpu_per_message for each in self.rounds if each.cpu_per_message is not None]
        return median(used) if used else None

    @property
    def latency(self) -> dict[str, float]:
        return {percent: median(each.latency[percent] for each in self.rounds) for percent in LATENCY_PERCENTILES}

    @property
    def is_generator_limited(self) -> bool:
        """Whether the load generator limited most rounds."""
        return 2 * sum(each.is_generator_limited for each in self.rounds) > len(self.rounds)

    def ratio(self, base: CandidateResult, figure: RoundFigure) -> dict[str, float] | None:
        """Return the spread of ``figure`` over the rounds, relative to ``base`` in the same round."""
        own, other = ([getattr(each, figure) for each in result.rounds] for result in (self, base))
        return spread([mine / its for mine, its in zip(own, other, strict=True) if mine and its])

    def as_json(self, base: CandidateResult) -> dict[str, Any]:
        return {
            "model": self.candidate.name,
            "engine": self.candidate.engine,
            "loop": self.candidate.loop,
            "chunk_size": self.candidate.chunk_size,
            "size": self.size,
            "messages_per_second": self.messages_per_second,
            "messages_per_second_rounds": [each.messages_per_second for each in self.rounds],
            "messages_per_second_ratio": self.ratio(base, "messages_per_second"),
            "cpu_per_message": self.cpu_per_message,
            "cpu_per_message_rounds": [each.cpu_per_message for each in self.rounds],
            "cpu_per_message_ratio": self.ratio(base, "cpu_per_message"),
            "service_time": {f"p{percent}": seconds for percent, seconds in self.latency.items()},
            "generator_was_the_limit": self.is_generator_limited,
        }


@dataclass
class Comparison:
    """The results by size, then by candidate."""

    plan: LoadPlan
    results: list[CandidateResult]
    machine: dict[str, Any]

    @property
    def sizes(self) -> list[int]:
        return list(dict.fromkeys(each.size for each in self.results))

    def results_of_size(self, size: int) -> list[CandidateResult]:
        return [each for each in self.results if each.size == size]

    def as_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            **{name: getattr(self.plan, name) for name in ("mode", "connections", "pipeline", "duration", "warmup")},
            "rounds": len(self.results[0].rounds),
            "base": self.results[0].candidate.name,
            "results": [each.as_json(self.results_of_size(each.size)[0]) for each in self.results],
        }


def spread(ratios: Sequence[float]) -> dict[str, float] | None:
    """Return the median, the minimum and the maximum."""
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)} if ratios else None


def make_candidates(engines: Sequence[EngineName], loops: Sequence[str], chunk_sizes: Sequence[int]) -> list[Candidate]:
    """Return all different combinations: ``threads`` has no event loop, and ``protocol`` ignores the chunk size."""
    return [
        Candidate(
            name=" ".join(filter(None, (engine, loop, f"{chunk_size} B" if chunk_size else None))),
            engine=engine,
            loop=loop,
            chunk_size=chunk_size,
            command=partial(server_command, engine, loop or "auto", chunk_size or UNLIMITED_CHUNK_SIZE),
        )
        for engine in engines
        for loop in (loops if engine != "threads" else (None,))
        for chunk_size in (chunk_sizes if engine != "protocol" else (None,))
    ]


def compare(
    candidates: Sequence[Candidate],
    sizes: Sequence[int],
    plan: LoadPlan,
    rounds: int,
    progress: Callable[[float], None] | None,
) -> Comparison:
    """Measure ``candidates`` with messages of each size. Ctrl-C raises KeyboardInterrupt: no result is partial."""
    machine = machine_info()
    results = [CandidateResult(candidate, size) for size in sizes for candidate in candidates]
    server_cpus, load_cpus = separate_cpus()
    done = 0
    for _ in range(rounds):
        for result in results:
            result.rounds.append(_measure(result.candidate, replace(plan, size=result.size), server_cpus, load_cpus))
            done += 1
            if progress is not None:
                progress(done)
    return Comparison(plan, results, machine)


def _measure(candidate: Candidate, plan: LoadPlan, server_cpus: Sequence[int], load_cpus: Sequence[int]) -> Round:
    with ServerProcess(candidate.command(plan.mode, plan.size), server_cpus) as server:
        plan = find_server(plan, *server.address)
        before = server.cpu_seconds()
        result = run_load(plan, cpus=load_cpus)
        after = server.cpu_seconds()
    if result.interrupted:
        raise KeyboardInterrupt
    if not result.is_complete:
        raise EchoError(f"cannot measure {candidate.name}: {result.describe_failures()}")
    if not result.messages:
        raise EchoError(f"cannot measure {candidate.name}: no replies within {plan.duration:g} s; increase --duration")
    return Round(
        result.messages_per_second,
        None if before is None or after is None else (after - before) / max(1, result.answered),
        {percent: result.latency.percentile(percent) for percent in LATENCY_PERCENTILES},
        result.is_generator_limited,
    )
