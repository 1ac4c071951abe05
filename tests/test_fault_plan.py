"""Faults without IO: specifications, which connection has a fault, and the actions that take the place of replies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_async.wire.faults import FaultSchedule, FaultScript, parse_fault, parse_sequence
from echo_async.wire.script import Action, EchoScript, End, Report, Send, Timer, Wait

MESSAGE = b"Hola Server!\n"


def script_of(fault: str, seed: int = 1, *, is_raw: bool = False) -> FaultScript:
    plan = FaultSchedule(fault, None, seed).next_plan()
    assert plan is not None
    return FaultScript(plan, EchoScript(is_raw=is_raw), is_raw=is_raw)


def without_reports(actions: Iterator[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, Report)]


def sent(actions: list[Action]) -> bytes:
    return b"".join(action.data for action in actions if isinstance(action, Send))


INVALID = [
    ("", "fault kind missing; choose from delay, rate, slice, drop,"),
    ("reset,", "fault kind missing; choose from"),
    ("dely=1", "unknown fault kind 'dely'; choose from delay, rate, slice, drop,"),
    ("reset;close", "semicolons separate the connections of a sequence: use fault_sequence"),
    ("reset,reset", "reset is given twice; semicolons separate the connections of a sequence"),
    ("delay", "delay requires seconds from 0 to 86400, or a range such as 0.05..0.2"),
    ("delay=-1", "delay requires seconds from 0"),
    ("delay=86401", "delay requires seconds from 0"),
    ("delay=2..1", "delay requires seconds from 0"),
    ("delay=1..2..3", "delay requires seconds from 0"),
    ("delay=nan", "delay requires seconds from 0"),
    ("delay=inf", "delay requires seconds from 0"),
    ("rate=0", "rate requires bytes per second, an integer from 1"),
    ("rate=1..2", "rate requires bytes per second, an integer from 1"),
    ("rate=1.5", "rate requires bytes per second, an integer from 1"),
    ("slice", "slice requires bytes, an integer from 1, or a range such as 1..3"),
    ("slice=+1", "slice requires bytes, an integer from 1"),
    ("close=-1", "close requires bytes of replies, an integer from 0"),
    ("reset=1_000", "reset requires bytes of replies, an integer from 0"),
    ("half-close=", "half-close requires bytes of replies, an integer from 0"),
    ("stall=2147483648", "stall requires bytes of replies, an integer from 0"),
    ("drop=1", "drop takes no value"),
    ("refuse=0", "refuse takes no value"),
    ("reset,close", "reset and close are mutually exclusive"),
    ("delay=1,refuse", "refuse and delay are mutually exclusive"),
    ("drop,corrupt", "drop and corrupt are mutually exclusive"),
    ("p=0.5", "p requires a kind; choose from delay, rate,"),
    ("drop,p=1.1", "p requires a share of the connections from 0 to 1"),
    ("drop,p", "p requires a share of the connections from 0 to 1"),
    ("no-accept,p=0.5", "no-accept applies to all connections and takes no probability (p)"),
    ("reset=2ms", "reset requires bytes of replies, an integer from 0, or a time such as 2s"),
    ("close=-1s", "close requires bytes of replies, an integer from 0, or a time such as 2s"),
    ("stall=86401s", "stall requires bytes of replies"),
    ("reset=infs", "reset requires bytes of replies"),
    ("garbage", "garbage requires bytes, an integer from 1 to 1048576"),
    ("garbage=0", "garbage requires bytes"),
    ("garbage=1048577", "garbage requires bytes"),
    ("delay=1,repeat=2", "repeat requires duplicate"),
    ("duplicate,repeat=101", "repeat requires copies of each reply, an integer from 1 to 100"),
    ("delay=1,interval=1", "interval requires slice"),
    ("slice=1,interval=-1", "interval requires seconds from 0 to 86400"),
    ("slice=1,interval=1,rate=1", "interval and rate are mutually exclusive"),
    ("drop,after", "after requires messages, an integer from 0"),
    ("drop,after=0.5", "after requires messages, an integer from 0"),
    ("reset=2s,after=1", "after and a time are mutually exclusive"),
    ("refuse,after=1", "after and refuse are mutually exclusive"),
    ("reset,none", "none stands alone, for no fault"),
]


def test_invalid_specification_names_the_part_and_the_allowed() -> None:
    for spec, error in INVALID:
        with pytest.raises(ValueError, match=re.escape(error)):
            parse_fault(spec)


def test_sequence_is_a_text_or_a_list() -> None:
    assert parse_sequence("reset=5; none ;drop") == parse_sequence(["reset=5", None, "drop"])
    assert parse_sequence(["none", " none "]) == [None, None]
    with pytest.raises(ValueError, match="no-accept applies to all connections, not to one of a sequence"):
        parse_sequence("reset;no-accept")


def test_sequence_faults_the_first_connections_only() -> None:
    faults = FaultSchedule(None, ["reset", None, "drop"], None)
    plans = [faults.next_plan() for _ in range(6)]
    assert [plan is not None for plan in plans] == [True, False, True, False, False, False]


def faulty(seed: int | None) -> set[int]:
    faults = FaultSchedule("reset,p=0.1", None, seed)
    return {number for number in range(1, 2001) if faults.next_plan() is not None}


def test_seed_decides_which_connections_have_a_fault() -> None:
    assert faulty(1) == faulty(1) != faulty(2)
    assert faulty(None) != faulty(None)
    three_sigma = 3 * math.sqrt(2000 * 0.1 * 0.9)
    assert all(abs(len(faulty(seed)) - 200) < three_sigma for seed in (1, 2, 3))


def test_probability_may_be_0_or_1() -> None:
    for share, expected in (("0", 0), ("1", 10), ("1e-9", 0)):
        faults = FaultSchedule(f"drop,p={share}", None, 1)
        assert sum(faults.next_plan() is not None for _ in range(10)) == expected


@given(st.lists(st.integers(1, 40), max_size=5))
def test_random_choices_do_not_depend_on_how_replies_are_grouped(groups: list[int]) -> None:
    messages = [b"%d\n" % number * (number % 3 + 1) for number in range(40)]
    messages = [line + b"\n" for message in messages for line in message.split(b"\n")[:-1]]
    together, apart = (script_of("delay=0..1,slice=1..9,corrupt") for _ in range(2))
    expected = list(together.reply(b"".join(messages)))
    actual = []
    for size in [*groups, len(messages)]:
        actual += list(apart.reply(b"".join(messages[:size])))
        del messages[:size]
    assert actual == expected


ACTIONS: list[tuple[str, list[Action]]] = [
    ("delay=0.5", [Wait(0.5), Send(MESSAGE)]),
    ("delay=0", [Wait(0), Send(MESSAGE)]),
    ("rate=13", [action for byte in MESSAGE for action in (Wait(1 / 13), Send(bytes([byte])))]),
    ("rate=26,slice=10", [Wait(10 / 26), Send(MESSAGE[:10]), Wait(3 / 26), Send(MESSAGE[10:])]),
    ("rate=1000000", [Wait(13 / 1000000), Send(MESSAGE)]),
    ("slice=5", [Send(b"Hola "), Wait(0.001), Send(b"Serve"), Wait(0.001), Send(b"r!\n")]),
    ("slice=13", [Send(MESSAGE)]),
    ("slice=8,interval=0.5", [Send(MESSAGE[:8]), Wait(0.5), Send(MESSAGE[8:])]),
    ("drop", []),
    ("duplicate", [Send(2 * MESSAGE)]),
    ("duplicate,repeat=3", [Send(3 * MESSAGE)]),
    ("duplicate,repeat=1", [Send(MESSAGE)]),
    ("garbage=1", [Send(b"\n")]),
    ("close,after=1", [Send(MESSAGE)]),
    ("drop,after=0", []),
    ("stall,after=1", [Send(MESSAGE), End.STALL]),
    ("delay=1,duplicate", [Wait(1), Send(2 * MESSAGE)]),
    ("close", [End.CLOSE]),
    ("close=5", [Send(b"Hola "), End.CLOSE]),
    ("close=13", [Send(MESSAGE), End.CLOSE]),
    ("close=14", [Send(MESSAGE)]),
    ("reset=1", [Send(b"H"), End.RESET]),
    ("half-close=5", [Send(b"Hola "), End.HALF_CLOSE]),
    ("stall=5", [Send(b"Hola "), End.STALL]),
    ("delay=1,reset", [Wait(1), End.RESET]),
]


SEVERAL: list[tuple[str, list[list[Action]]]] = [
    ("stall", [[]]),
    ("close=20", [[Send(MESSAGE)], [Send(MESSAGE[:7]), End.CLOSE], []]),
    ("delay=1", [[Wait(1), Send(MESSAGE)], [Wait(1), Send(MESSAGE), Wait(1), Send(MESSAGE)]]),
    ("close=5,delay=1,after=2", [[Send(MESSAGE)], [Send(MESSAGE), Wait(1), Send(MESSAGE[:5]), End.CLOSE]]),
]
"""The actions of a reply to one message, to two, to three."""


def test_replies_become_actions() -> None:
    for spec, actions in ACTIONS:
        script = script_of(spec)
        assert list(script.start()) == []
        assert without_reports(script.reply(MESSAGE)) == actions, spec
    for spec, replies in SEVERAL:
        script = script_of(spec)
        assert without_reports(script.start()) == ([End.STALL] if spec == "stall" else [])
        for number, actions in enumerate(replies, start=1):
            assert without_reports(script.reply(number * MESSAGE)) == actions, spec
    raw = script_of("delay=1", is_raw=True)
    assert without_reports(raw.reply(b"one\ntwo")) == [Wait(1), Send(b"one\ntwo")]


def test_rate_delays_a_long_reply_in_proportion() -> None:
    actions = without_reports(script_of("rate=200000").reply(bytes(50_000)))
    assert [action.seconds for action in actions if isinstance(action, Wait)] == pytest.approx([0.1, 0.1, 0.05])
    assert [len(action.data) for action in actions if isinstance(action, Send)] == [20_000, 20_000, 10_000]


def test_end_at_a_time_is_a_timer_whatever_was_sent() -> None:
    for end in End:
        script = script_of(f"{end.value}=1.5s,delay=2")
        [timer] = script.start()
        assert isinstance(timer, Timer)
        assert timer.seconds == 1.5
        assert without_reports(script.reply(MESSAGE)) == [Wait(2), Send(MESSAGE)]
        assert list(timer.then()) == [Report(end.value, f"fault injected: {end.value}=1.5s"), end]
        assert list(script.reply(MESSAGE)) == []


def test_drop_after_messages_is_silent_from_then_on() -> None:
    script = script_of("drop,after=1")
    assert not script.is_silent
    assert without_reports(script.reply(2 * MESSAGE)) == [Send(MESSAGE)]
    assert script.is_silent


@given(st.integers(1, 300), st.integers(0, 1000))
def test_garbage_has_one_newline_at_its_end(size: int, seed: int) -> None:
    first, again = (sent(without_reports(script_of(f"garbage={size}", seed).reply(MESSAGE))) for _ in range(2))
    assert first == again
    assert (len(first), first.find(b"\n")) == (size, size - 1)


def test_each_kind_is_reported_once_when_it_takes_effect() -> None:
    script = script_of("delay=0,slice=20,reset=20")
    assert [action for action in script.reply(MESSAGE) if isinstance(action, Report)] == [
        Report("delay", "fault injected: delay=0"),
        Report("slice", "fault injected: slice=20"),
    ]
    assert [action for action in script.reply(MESSAGE) if isinstance(action, Report)] == [
        Report("reset", "fault injected: reset=20")
    ]


@given(st.binary(max_size=30), st.integers(0, 1000))
def test_corrupt_flips_one_bit_and_keeps_the_framing(data: bytes, seed: int) -> None:
    """Except in raw mode, which has none, and of an empty message, which is nothing else."""
    message = data.replace(b"\n", b"\r") + b"\n"
    for is_raw in (False, True):
        reply = sent(without_reports(script_of("corrupt", seed, is_raw=is_raw).reply(message)))
        assert sum((a ^ b).bit_count() for a, b in zip(message, reply, strict=True)) == 1
        assert is_raw or not data or (reply.count(b"\n"), reply[-1:]) == (1, b"\n")


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 100))
def test_slices_are_in_their_range_and_complete(low: int, more: int, seed: int) -> None:
    actions = without_reports(script_of(f"slice={low}..{low + more}", seed).reply(bytes(100) + b"\n"))
    sizes = [len(action.data) for action in actions if isinstance(action, Send)]
    assert sent(actions) == bytes(100) + b"\n"
    assert all(low <= size <= low + more for size in sizes[:-1])
