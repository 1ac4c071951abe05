"""The round-trip times of ``--count``: exact for few messages, sampled for many."""

from __future__ import annotations

import pytest

from echo_async.cli import ping
from echo_async.cli.ping import RoundTrips


def times(trips: RoundTrips) -> list[float]:
    line = trips.summary("server").splitlines()[-1]
    return [float(time) for time in line.rpartition(" = ")[2].removesuffix(" ms").split("/")]


def test_summary_of_round_trips_has_counts_and_times() -> None:
    trips = RoundTrips()
    trips.sent = 1
    heading, counts = trips.summary("server").splitlines()
    assert heading == "--- server echo statistics ---"
    assert counts.startswith("1 sent, 0 received, 1 lost (100%), time ")
    trips.add(0.001)
    assert times(trips) == [1] * 5
    for milliseconds in range(100, 1, -1):
        trips.add(milliseconds / 1000)
    assert times(trips) == [1, 50.5, 50, 99, 100]
    trips.sent = 300
    assert trips.lost == 200
    assert trips.summary("server").splitlines()[1].startswith("300 sent, 100 received, 200 lost (66.7%), time ")


def test_samples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping, "MAX_SAMPLES", 1000)
    trips = RoundTrips()
    for number in range(10_000):
        trips.add(0.001 if number % 2 else 0.003)
    assert len(trips._samples) == 1000
    least, average, _, p99, most = times(trips)
    assert (least, average, p99, most) == (1, 2, 3, 3)
