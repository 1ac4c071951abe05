"""Numbered datagrams and their replies, without IO."""

from __future__ import annotations

from itertools import product
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_async.client import datagram_tracker
from echo_async.client.datagram_tracker import DatagramFormat, DatagramTracker, Reply

SIZES = (0, 1, 2, 3, 4, 7, 8, 9, 64, 1472, 65_507, 65_527)


def sent_tracker(count: int, *, size: int = 64, timeout: float = 1.0) -> tuple[DatagramTracker, list[bytes]]:
    """Return a tracker that has sent datagrams at 1, 2, ... seconds, and the datagrams from number 1 on."""
    tracker, sent = DatagramTracker(DatagramFormat(size), timeout), [b""]
    for number in range(1, count + 1):
        sent.append(tracker.next_datagram())
        tracker.record_sent(float(number))
    return tracker, sent


def test_format_decodes_what_it_encodes() -> None:
    for size, number in product(SIZES, (1, 2, 255, 256, 65_536, 2**32 - 1, 2**32, 2**32 + 5)):
        format = DatagramFormat(size)
        data = format.encode(number)
        assert len(data) == size
        assert format.decode(data, number) == number
        assert format.decode(data + b"x", number) is None


def test_format_has_number_and_crc() -> None:
    data = DatagramFormat(20).encode(258)
    assert data[:4] == b"\0\0\1\2"
    assert int.from_bytes(data[4:8], "big") == crc32(data[:4] + data[8:])


def test_format_every_flipped_bit_is_detected() -> None:
    format = DatagramFormat(64)
    data = format.encode(77)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert format.decode(bytes(changed), 100) is None


def test_format_other_salt_or_unsent_number_is_no_reply() -> None:
    assert DatagramFormat(64).decode(DatagramFormat(64, salt=1).encode(1), 1) is None
    assert DatagramFormat(64).decode(DatagramFormat(64).encode(2), 1) is None


def test_format_short_numbers_stand_for_the_latest() -> None:
    format = DatagramFormat(1)
    assert format.decode(b"\x05", 4) is None
    assert [format.decode(b"\x05", last) for last in (5, 260, 261, 300)] == [5, 5, 261, 261]
    assert [DatagramFormat(0).decode(b"", last) for last in (0, 1, 9)] == [None, 1, 9]


def test_tracker_counts_each_kind_of_reply() -> None:
    tracker, sent = sent_tracker(4)
    assert tracker.receive(sent[2], 2.5) == Reply(2, 0.5)
    assert tracker.receive(sent[2], 2.6) == Reply(2, None)
    assert tracker.receive(sent[1], 1.75) == Reply(1, 0.75, is_reordered=True)
    assert tracker.receive(sent[3][:-1] + b"?", 3.5) is None
    assert tracker.receive(sent[4], 5.0) == Reply(4, 1.0, is_late=True)
    assert (tracker.sent, tracker.received, tracker.in_flight, tracker.lost) == (4, 3, 1, 0)
    assert tracker.expire(4.0) == [3]
    assert (tracker.lost, tracker.late, tracker.duplicated, tracker.reordered, tracker.corrupted) == (1, 1, 1, 1, 1)


def test_tracker_gives_up_the_oldest() -> None:
    tracker, _ = sent_tracker(2)
    assert [tracker.give_up_oldest() for _ in range(3)] == [1, 2, None]
    assert (tracker.lost, tracker.in_flight, tracker.deadline) == (2, 0, None)


def test_tracker_limits_datagrams_in_flight() -> None:
    for size, window in ((0, 1), (1, 64), (64, 64), (1472, 22), (65_507, 1)):
        tracker, sent = sent_tracker(window, size=size)
        assert not tracker.can_send
        tracker.receive(sent[-1], 1.0)  # the earlier ones are lost, or were overtaken
        assert tracker.can_send


def test_tracker_without_replies_uses_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagram_tracker, "MAX_UNANSWERED", 10)
    tracker, sent = sent_tracker(30)
    tracker.expire(100.0)
    assert tracker.lost == 30
    assert tracker.receive(sent[20], 101.0) == Reply(20, None)
    assert tracker.receive(sent[21], 101.0) == Reply(21, 80.0, is_late=True)


Action = tuple[str, int]
ACTIONS = st.lists(st.tuples(st.sampled_from(["send", "receive", "corrupt", "wait"]), st.integers(0, 30)), max_size=80)


@given(ACTIONS, st.sampled_from([4, 8, 20]))
def test_tracker_agrees_with_a_model(actions: list[Action], size: int) -> None:
    """Any datagrams arrive, in any order and number; each has exactly one outcome."""
    tracker, sent, timeout, now = DatagramTracker(DatagramFormat(size), 50), [b""], 50, 0
    times: dict[int, int] = {}
    replied: dict[int, int] = {}
    expired: list[int] = []
    duplicates = corrupted = reordered = 0
    for action, argument in actions:
        number = argument % len(sent)
        match action:
            case "send" if tracker.can_send:
                sent.append(tracker.next_datagram())
                tracker.record_sent(now)
                times[len(times) + 1] = now
            case "receive" if number:
                reply = tracker.receive(sent[number], now)
                duplicates += number in replied
                reordered += number not in replied and any(each > number for each in replied)
                assert reply is not None
                assert (reply.number, reply.seconds is None) == (number, number in replied)
                replied.setdefault(number, now - times[number])
            case "corrupt":
                corrupted += 1
                assert tracker.receive(sent[number] + b"x", now) is None
            case "wait":
                now += argument
                expired += tracker.expire(now)
    expired += tracker.expire(now + timeout)
    assert len(set(expired)) == len(expired)
    assert set(times) - set(replied) <= set(expired)
    assert (tracker.sent, tracker.received, tracker.in_flight) == (len(times), len(replied), 0)
    assert tracker.lost == len(times) - len(replied)
    assert tracker.late == sum(seconds >= timeout for seconds in replied.values())
    assert (tracker.duplicated, tracker.reordered, tracker.corrupted) == (duplicates, reordered, corrupted)
