"""Servers compared side by side: each round starts, loads and stops every candidate once.

The speed of a machine changes from minute to minute. Interleaved rounds compare what was measured within
seconds: each round has its own ratio, and the spread of the ratios shows how reliable their median is. On a busy
machine the CPU time per message is the most reliable figure. The first candidate is the base of the ratios.

Beside a disturbance, the load is that of clients that behave well: what they notice is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from time import perf_counter, sleep
from typing import Any, Literal

from ..config import EngineName
from ..errors import EchoError
from .disturbance import Disturbance
from .load import find_server, run_load
from .machine import machine_info, separate_cpus
from .plan import LoadMode, LoadPlan
from .result import LoadResult
from .server import ServerProcess, server_command

LATENCY_PERCENTILES = ("0", "1", "5", *map(str, range(10, 100, 10)), "95", "98", "99", "99.5", "99.9", "99.99", "100")
UNLIMITED_CHUNK_SIZE = 2**16  # bytes
PAUSE = 0.001  # seconds between a reply and the next message beside a disturbance
RoundFigure = Literal["messages_per_second", "cpu_per_message", "p99"]


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
    flood_rate: float | None = None
    """Bytes per second that the client that floods the server received."""
    idle_cpu: float | None = None
    """Share of a core that the server used while all its connections were idle."""

    @property
    def p99(self) -> float:
        return self.latency["99"]


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
        return self._median("cpu_per_message")

    @property
    def p99(self) -> float:
        return self.latency["99"]

    @property
    def flood_rate(self) -> float | None:
        return self._median("flood_rate")

    @property
    def idle_cpu(self) -> float | None:
        return self._median("idle_cpu")

    def _median(self, figure: str) -> float | None:
        known = [value for each in self.rounds if (value := getattr(each, figure)) is not None]
        return median(known) if known else None

    @property
    def longest(self) -> float:
        """The longest round trip of all rounds."""
        return max(each.latency["100"] for each in self.rounds)

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

    def disturbance_as_json(self, base: CandidateResult) -> dict[str, Any]:
        return {
            "p99_rounds": [each.p99 for each in self.rounds],
            "p99_ratio": self.ratio(base, "p99"),
            "longest": self.longest,
            "flood_bytes_per_second": self.flood_rate,
            "flood_bytes_per_second_rounds": [each.flood_rate for each in self.rounds],
            "idle_cpu": self.idle_cpu,
            "idle_cpu_rounds": [each.idle_cpu for each in self.rounds],
        }


@dataclass
class Comparison:
    """The results by size, then by candidate."""

    plan: LoadPlan
    results: list[CandidateResult]
    machine: dict[str, Any]
    disturbance: Disturbance | None = None

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
            "disturbance": None if self.disturbance is None else str(self.disturbance),
            "results": [self._result_as_json(each, self.results_of_size(each.size)[0]) for each in self.results],
        }

    def _result_as_json(self, result: CandidateResult, base: CandidateResult) -> dict[str, Any]:
        return result.as_json(base) | ({} if self.disturbance is None else result.disturbance_as_json(base))


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
    disturbance: Disturbance | None = None,
) -> Comparison:
    """Measure ``candidates`` with messages of each size. Ctrl-C raises KeyboardInterrupt: no result is partial."""
    machine = machine_info()
    results = [CandidateResult(candidate, size) for size in sizes for candidate in candidates]
    measure = _measure if disturbance is None else partial(_measure_disturbed, disturbance=disturbance)
    done = 0
    for _ in range(rounds):
        for result in results:
            result.rounds.append(measure(result.candidate, replace(plan, size=result.size)))
            done += 1
            if progress is not None:
                progress(done)
    return Comparison(plan, results, machine, disturbance)


def _measure(candidate: Candidate, plan: LoadPlan) -> Round:
    server_cpus, load_cpus, _ = separate_cpus()
    with ServerProcess(candidate.command(plan.mode, plan.size), server_cpus) as server:
        plan = find_server(plan, *server.address)
        before = server.cpu_seconds()
        with _name_in_errors(candidate):
            result = _run_load(plan, load_cpus)
        after = server.cpu_seconds()
    cpu = None if before is None or after is None else (after - before) / max(1, result.answered)
    return Round(result.messages_per_second, cpu, _percentiles(result), result.is_generator_limited)


def _measure_disturbed(candidate: Candidate, plan: LoadPlan, disturbance: Disturbance) -> Round:
    server_cpus, load_cpus, disturbance_cpus = separate_cpus()
    with ServerProcess(candidate.command(plan.mode, plan.size), server_cpus) as server:
        plan = find_server(replace(plan, pause=PAUSE), *server.address)
        with _name_in_errors(candidate), disturbance.run(plan, disturbance_cpus) as finish:
            idle_cpu = _idle_cpu(server, plan) if disturbance.idle else None
            result = _run_load(plan, load_cpus)
            flood = finish()
    return Round(
        result.messages_per_second,
        None,
        _percentiles(result),
        result.is_generator_limited if flood is None else flood.is_generator_limited,
        None if flood is None else flood.messages_per_second * flood.plan.size,
        idle_cpu,
    )


@contextmanager
def _name_in_errors(candidate: Candidate) -> Iterator[None]:
    """Add the name of the candidate to errors."""
    try:
        yield
    except EchoError as error:
        raise EchoError(f"cannot measure {candidate.name}: {error}") from error


def _run_load(plan: LoadPlan, cpus: Sequence[int]) -> LoadResult:
    result = run_load(plan, cpus=cpus)
    if result.interrupted:
        raise KeyboardInterrupt
    if not result.is_complete:
        raise EchoError(result.describe_failures())
    if not (result.messages if plan.pause == 0 else result.latency.count):
        raise EchoError(f"no replies within {plan.duration:g} s; increase --duration")
    return result


def _percentiles(result: LoadResult) -> dict[str, float]:
    return {percent: result.latency.percentile(percent) for percent in LATENCY_PERCENTILES}


def _idle_cpu(server: ServerProcess, plan: LoadPlan) -> float | None:
    """Return the share of a core that the server uses without load, after the warm-up."""
    sleep(plan.warmup)
    start, before = perf_counter(), server.cpu_seconds()
    sleep(plan.duration)
    after = server.cpu_seconds()
    return None if before is None or after is None else (after - before) / (perf_counter() - start)
