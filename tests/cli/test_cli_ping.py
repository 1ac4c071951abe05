"""The round-trip times of ``--count``: exact for few messages, sampled for many."""

from __future__ import annotations

import pytest

from echo_async.cli import ping
from echo_async.cli.ping import RoundTrips


def times(trips: RoundTrips) -> list[float]:
    line = trips.summary("server").splitlines()[-1]
    return [float(time) for time in line.rpartition(" = ")[2].removesuffix(" ms").split("/")]


def test_summary_of_a_hundred_round_trips() -> None:
    trips = RoundTrips()
    for milliseconds in range(100, 0, -1):
        trips.sent += 1
        trips.add(milliseconds / 1000)
    assert times(trips) == [1, 50.5, 50, 99, 100]


def test_summary_of_one_round_trip() -> None:
    trips = RoundTrips()
    trips.sent += 1
    trips.add(0.001)
    assert times(trips) == [1] * 5


def test_summary_counts_lost_messages() -> None:
    trips = RoundTrips()
    trips.sent += 3
    trips.add(0.001)
    assert trips.lost == 2
    assert trips.summary("server").splitlines()[1].startswith("3 sent, 1 received, 2 lost (66.7%), time ")


def test_summary_without_replies_has_no_times() -> None:
    trips = RoundTrips()
    trips.sent += 1
    heading, counts = trips.summary("server").splitlines()
    assert heading == "--- server echo statistics ---"
    assert counts.startswith("1 sent, 0 received, 1 lost (100%), time ")


def test_samples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping, "MAX_SAMPLES", 1000)
    trips = RoundTrips()
    for number in range(10_000):
        trips.add(0.001 if number % 2 else 0.003)
    assert len(trips._samples) == 1000
    least, average, _, p99, most = times(trips)
    assert (least, average, p99, most) == (1, 2, 3, 3)
