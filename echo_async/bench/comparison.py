"""Servers side by side. In each round every one of them is started, loaded and stopped, one after the other.

Rounds are interleaved because a machine is not the same from minute to minute: what is compared is measured
within seconds, each round gives its own ratio, and the spread of the ratios tells how far to trust their
median. The figure that holds on a noisy machine is the server's CPU time a message. The first model is the
base of the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..config import EngineName
from ..errors import EchoError
from ..loops import LoopName
from .load import LoadResult, find_server, run_load
from .machine import facts, separate_cpus
from .plan import LoadMode, LoadPlan
from .server import ServerProcess, server_command

__all__ = ["PLOT_PERCENTILES", "Candidate", "CandidateResult", "Comparison", "compare", "make_candidates"]

PLOT_PERCENTILES = ("0", "1", "5", *map(str, range(10, 100, 10)), "95", "98", "99", "99.5", "99.9", "99.99")
"""The percentiles that a picture of the latencies is drawn from."""

OUT_OF_THE_WAY = 2**16  # a chunk size that is as good as none


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to serve."""

    name: str
    engine: str
    loop: str | None = None
    """None: none, as with threads."""
    chunk_size: int | None = None
    """None: the engine takes what the kernel has."""
    command: Callable[[LoadMode, int], Sequence[str]]
    """What starts it, for a mode and a message size."""


@dataclass
class Round:
    """One load on one server."""

    messages_per_second: float
    cpu_per_message: float | None
    """Seconds of the server's CPU time."""
    curve: dict[str, float]
    generator_was_the_limit: bool

    @classmethod
    def of(cls, result: LoadResult, cpu: float | None) -> Round:
        return cls(
            result.messages_per_second,
            None if cpu is None else cpu / max(1, result.answered),
            {percent: result.times.percentile(percent) for percent in PLOT_PERCENTILES},
            result.generator_was_the_limit,
        )


@dataclass
class CandidateResult:
    """One model with one message size: its rounds, and what they say together."""

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
    def curve(self) -> dict[str, float]:
        return {percent: median(each.curve[percent] for each in self.rounds) for percent in PLOT_PERCENTILES}

    @property
    def generator_was_the_limit(self) -> bool:
        """In most rounds."""
        return 2 * sum(each.generator_was_the_limit for each in self.rounds) > len(self.rounds)

    def rate_ratios(self, base: CandidateResult) -> list[float]:
        """How many times the messages a second of ``base``, round by round."""
        return [mine.messages_per_second / its.messages_per_second for mine, its in self._with(base)]

    def cpu_ratios(self, base: CandidateResult) -> list[float]:
        """How many times the CPU time a message of ``base``, round by round."""
        return [
            mine.cpu_per_message / its.cpu_per_message
            for mine, its in self._with(base)
            if mine.cpu_per_message and its.cpu_per_message
        ]

    def _with(self, base: CandidateResult) -> Iterator[tuple[Round, Round]]:
        return zip(self.rounds, base.rounds, strict=False)

    def as_json(self, base: CandidateResult) -> dict[str, Any]:
        return {
            "model": self.candidate.name,
            "engine": self.candidate.engine,
            "loop": self.candidate.loop,
            "chunk_size": self.candidate.chunk_size,
            "size": self.size,
            "messages_per_second": self.messages_per_second,
            "messages_per_second_rounds": [each.messages_per_second for each in self.rounds],
            "messages_per_second_ratio": spread(self.rate_ratios(base)),
            "cpu_per_message": self.cpu_per_message,
            "cpu_per_message_rounds": [each.cpu_per_message for each in self.rounds],
            "cpu_per_message_ratio": spread(self.cpu_ratios(base)),
            "service_time": {f"p{percent}": seconds for percent, seconds in self.curve.items()},
            "generator_was_the_limit": self.generator_was_the_limit,
        }


@dataclass
class Comparison:
    """All results, by size and then by model."""

    plan: LoadPlan
    results: list[CandidateResult]
    machine: dict[str, Any]

    @property
    def sizes(self) -> list[int]:
        return list(dict.fromkeys(each.size for each in self.results))

    def of_size(self, size: int) -> list[CandidateResult]:
        return [each for each in self.results if each.size == size]

    def base(self, result: CandidateResult) -> CandidateResult:
        return self.of_size(result.size)[0]

    def as_json(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "machine": self.machine,
            "mode": plan.mode,
            "connections": plan.connections,
            "pipeline": plan.pipeline,
            "duration": plan.duration,
            "warmup": plan.warmup,
            "rounds": len(self.results[0].rounds),
            "base": self.results[0].candidate.name,
            "results": [each.as_json(self.base(each)) for each in self.results],
        }


def spread(ratios: Sequence[float]) -> dict[str, float] | None:
    """The median of ``ratios``, the least and the greatest."""
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)} if ratios else None


def make_candidates(
    engines: Sequence[EngineName], loops: Sequence[LoopName], chunk_sizes: Sequence[int]
) -> list[Candidate]:
    """Every combination that makes a difference: threads have no loop, and ``protocol`` reads no chunks."""
    made = []
    for engine in engines:
        for loop in loops if engine != "threads" else (None,):
            for chunk_size in chunk_sizes if engine != "protocol" else (None,):
                made.append(_make_candidate(engine, loop, chunk_size))
    return made


def _make_candidate(engine: EngineName, loop: LoopName | None, chunk_size: int | None) -> Candidate:
    def command(mode: LoadMode, size: int) -> Sequence[str]:
        return server_command(engine, loop or "auto", chunk_size or OUT_OF_THE_WAY, mode, size)

    name = " ".join([engine, *([loop] if loop else []), *([f"{chunk_size} B"] if chunk_size else [])])
    return Candidate(name=name, engine=engine, loop=loop, chunk_size=chunk_size, command=command)


def compare(
    candidates: Sequence[Candidate],
    sizes: Sequence[int],
    plan: LoadPlan,
    rounds: int,
    progress: Callable[[float], None] | None,
) -> Comparison:
    """Measure ``candidates`` with messages of each size. :exc:`~echo_async.EchoError` if one does not echo.

    :exc:`KeyboardInterrupt` on Ctrl-C: what was cut short is not to be compared.
    """
    machine = facts()
    results = [CandidateResult(candidate, size) for size in sizes for candidate in candidates]
    server_cpus, load_cpus = separate_cpus()
    done = 0
    for _ in range(rounds):
        for result in results:
            result.rounds.append(_measure(result, plan, server_cpus, load_cpus))
            done += 1
            if progress is not None:
                progress(done)
    return Comparison(plan, results, machine)


def _measure(result: CandidateResult, plan: LoadPlan, server_cpus: Sequence[int], load_cpus: Sequence[int]) -> Round:
    with ServerProcess(result.candidate.command(plan.mode, result.size), server_cpus) as server:
        here = plan.with_size(result.size).at(*find_server(*server.address, None, plan))
        before = server.cpu_seconds()
        load = run_load(here, cpus=load_cpus)
        after = server.cpu_seconds()
    if load.interrupted:
        raise KeyboardInterrupt
    if not load.everything_came_back:
        what = load.mismatch or dict(load.failures)
        raise EchoError(f"{result.candidate.name} does not echo {result.size} bytes a message: {what}")
    if not load.messages:
        raise EchoError(f"{result.candidate.name} answered nothing in {plan.duration:g} s: give a longer --duration")
    return Round.of(load, None if before is None or after is None else after - before)
