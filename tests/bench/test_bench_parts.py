"""The parts of the benchmark that need no server: pattern, samples, expectations, plans."""

from __future__ import annotations

import select
import socket
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from io import BytesIO
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_async import ConfigError
from echo_async.bench.comparison import (
    LATENCY_PERCENTILES,
    Candidate,
    CandidateResult,
    Comparison,
    Round,
    make_candidates,
    spread,
)
from echo_async.bench.expectation import Expectation
from echo_async.bench.machine import machine_info
from echo_async.bench.pattern import MAX_IO_SIZE, Pattern
from echo_async.bench.plan import LoadPlan
from echo_async.bench.poller import READ, WRITE, Poller
from echo_async.bench.recorder import Recorder, read_result
from echo_async.bench.report import print_comparison, print_load
from echo_async.bench.result import Distribution, LoadResult

PLAN = LoadPlan(family=socket.AF_INET, address=("127.0.0.1", 1), connections=5, size=1000)


def distribution(*times: float, counts: list[int] | None = None) -> Distribution:
    return Distribution(np.array(times, dtype=np.float64), np.array(counts or [1] * len(times), dtype=np.uint64))


def result(*times: float, messages: int = 0, lost: int = 0) -> LoadResult:
    return LoadResult(plan=PLAN, seconds=2.0, messages=messages, lost=lost, service=distribution(*times), response=None)


def test_pattern_repeats_whole_messages() -> None:
    for size in (1, 2, 20, 1024, 100_000, 300_000):
        pattern = Pattern(size)
        block = pattern.data[: pattern.length]
        assert block.count(b"\n") == pattern.messages == len(block) / size
        assert all(block[end] == ord("\n") for end in range(size - 1, len(block), size))
        assert len(pattern.data) >= pattern.length + MAX_IO_SIZE
        assert pattern.data[pattern.length :].startswith(block[: MAX_IO_SIZE - 1][: len(pattern.data) - pattern.length])


def test_pattern_messages_and_start_offsets_differ() -> None:
    pattern = Pattern(20)
    assert len(set(pattern.data[: pattern.length].splitlines())) == pattern.messages
    assert len({pattern.start_offset(number) for number in range(100)}) == 100


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(0, 299))
def test_pattern_mismatch_is_located(at: int, length: int, wrong: int) -> None:
    pattern = Pattern(50)
    data = bytearray(pattern.data[at : at + length])
    assert pattern.matching_prefix_length(bytes(data), at) == length
    data[wrong % length] ^= 1
    assert pattern.matching_prefix_length(bytes(data), at) == wrong % length


@pytest.mark.parametrize("has_epoll", [True, False])
def test_poller_reports_what_is_watched(has_epoll: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_epoll:
        monkeypatch.delattr(select, "epoll")
    one, other = socket.socketpair()
    poller = Poller()
    descriptor = one.fileno()
    with one, other, closing(poller):
        poller.register(descriptor, READ, one.fileno)
        assert list(poller.poll(0)) == []
        poller.modify(descriptor, READ | WRITE, one.getpeername)
        assert [ready for ready, _ in poller.poll(0)] == [descriptor]
        assert poller.callbacks == {descriptor: one.getpeername}
        poller.modify(descriptor, READ, one.fileno)
        other.send(b"x")
        assert [ready for ready, _ in poller.poll(1)] == [descriptor]
        if has_epoll:
            assert select.select([poller.fileno()], (), (), 0)[0]
        poller.unregister(descriptor)
        assert (list(poller.poll(0)), poller.callbacks) == ([], {})


def test_distribution_without_samples_is_zero() -> None:
    times = distribution()
    assert (times.count, times.min, times.mean, times.percentile(99), times.max) == (0, 0, 0, 0, 0)


@given(st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 5)), min_size=1, max_size=50), st.integers(1, 100))
def test_distribution_equals_the_expanded_samples(samples: list[tuple[float, int]], percent: int) -> None:
    times = distribution(*(each for each, _ in samples), counts=[count for _, count in samples])
    expanded = sorted(each for each, count in samples for _ in range(count))
    assert times.percentile(percent) == expanded[-(-percent * len(expanded) // 100) - 1]
    assert times.mean == pytest.approx(mean(expanded))


def test_recorder_result_survives_serialization() -> None:
    recorder = Recorder(is_open_loop=True)
    recorder.add(0.0, 1.0, 3.0, 2)
    recorder.end_warmup()
    recorder.add(1.0, 2.0, 2.5, 4)
    recorder.end_window()
    recorder.add(1.5, 2.0, 6.0, 1)
    out = BytesIO()
    recorder.write(out)
    out.seek(0)
    facts, service, waits, counts = read_result(out.readline(), out.read)
    assert (facts["answered"], facts["in_window"], facts["samples"]) == (7, 4, 2)
    assert np.frombuffer(service).tolist() == [0.5, 4.0]
    assert np.frombuffer(waits).tolist() == [1.0, 0.5]
    assert np.frombuffer(counts, dtype=np.uint64).tolist() == [4, 1]


def test_load_result_rate_counts_the_window() -> None:
    measured = result(0.1, messages=3000)
    assert measured.messages_per_second == 1500
    assert measured.megabytes_per_second == 1.5
    assert measured.is_complete
    assert not result(0.1, lost=1).is_complete
    measured.failures = Counter({"connection refused": 1})
    assert not measured.is_complete


def test_load_result_busy_generator_is_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    load = result(*[0.1] * 1000)
    load.generator_cpu, load.late_by_generator = [0.5], 11
    assert load.is_generator_limited
    load.generator_cpu, load.late_by_generator = [0.5, 0.9], 0
    assert not load.is_generator_limited
    load.generator_cpu = [0.5, 0.99]
    assert load.is_generator_limited
    print_load(load, [])
    out = " ".join(capsys.readouterr().out.split())
    assert "the load generator was the limit, not the server (it used 50 %, 99 % of a core)" in out


MET = ["p50<21ms", "p50 <= 20 ms", "max<=30000us", "min>=10ms", "mean>19ms", "rate>=1500", "late<1"]
NOT_MET = ["p50<20ms", "p99.9<0.03s", "max<30000µs", "rate>1.5e3", "lost<1"]
INVALID = ["", "p99", "p99<", "p99<5", "p99<5 min", "p101<5ms", "p99=5ms", "q<5ms", "rate>5ms", "p99<1.2.3ms", "lost<x"]


def test_expectation_compares_the_metric() -> None:
    load = result(0.01, 0.02, 0.03, messages=3000, lost=1)
    assert [each for each in MET + NOT_MET if Expectation.parse(each).is_met(load)] == MET
    for text in ("p99<1s", "p99>1s"):  # there are no replies
        assert not Expectation.parse(text).is_met(result())


def test_expectation_invalid_text_is_an_error() -> None:
    for text in INVALID:
        with pytest.raises(ConfigError, match="p99<5ms") as caught:
            Expectation.parse(text)
        assert repr(text) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_plan_split_shares_connections_and_rate() -> None:
    plan = LoadPlan(connections=5, rate=100.0, processes=2)
    assert [(each.connections, each.rate) for each in plan.split()] == [(3, 60.0), (2, 40.0)]
    assert [each.rate for each in LoadPlan(connections=2, processes=2).split()] == [None, None]


def test_plan_json_round_trip_is_equal() -> None:
    assert LoadPlan.from_json({**asdict(PLAN), "address": ["127.0.0.1", 1]}) == PLAN


def test_candidates_are_distinct_combinations() -> None:
    candidates = make_candidates(["threads", "streams", "protocol"], ["asyncio", "uvloop"], [20, 4096])
    assert [each.name for each in candidates] == [
        *("threads 20 B", "threads 4096 B"),
        *("streams asyncio 20 B", "streams asyncio 4096 B", "streams uvloop 20 B", "streams uvloop 4096 B"),
        *("protocol asyncio", "protocol uvloop"),
    ]
    for each, (loop, chunk_size) in zip(candidates[1:3], [("auto", "4096"), ("asyncio", "20")], strict=True):
        command = each.command("stream", 64)
        assert (command[command.index("--loop") + 1], command[command.index("--chunk-size") + 1]) == (loop, chunk_size)


def test_spread_is_median_minimum_maximum() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([]) is None


def compared(*rates: tuple[float, ...]) -> Comparison:
    """A comparison of servers with these messages per second in each round."""
    results = []
    for number, each in enumerate(rates):
        candidate = Candidate(name=f"server {number}", engine="streams", command=lambda mode, size: [])
        rounds = [Round(rate, 1 / rate, dict.fromkeys(LATENCY_PERCENTILES, 0.1), False) for rate in each]
        results.append(CandidateResult(candidate, 1024, rounds))
    return Comparison(PLAN, results, machine_info())


def test_comparison_names_servers_whose_spread_is_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(compared((100, 200, 300), (110, 210, 330), (100, 500, 300)))
    out = capsys.readouterr().out
    assert "ratio: to the first line, of measurements in the same round; median of the rounds (min-max)" in out
    assert "spread too large: server 2; compare on an idle machine, with a longer --duration" in out
    print_comparison(compared((100, 10, 100), (200, 20, 190)))  # a machine that was busy in the second round
    assert "spread" not in capsys.readouterr().out
