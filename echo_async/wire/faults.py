"""Faults, without IO: what a server does to its replies, or to a connection, instead of just replying.

A specification such as ``delay=0.05..0.2,slice=1..3`` becomes a :class:`Fault`. A :class:`FaultSchedule` decides which
connection has one, as a :class:`FaultPlan`, and :class:`FaultScript` applies it to the replies of another script.
Every random choice depends on the seed, the number of the connection and the number of the reply only: the same seed
causes the same faults, whatever the timing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from .script import Action, End, Report, Script, Send, Timer, Wait, split_messages

MAX_DELAY = 86_400.0  # seconds
MAX_REPLY_BYTES = 2**31 - 1  # bytes
MAX_GARBAGE = 2**20  # bytes, which are in memory at once
MAX_REPEAT = 100  # copies of a reply, which are in memory at once
RATE_INTERVAL = 0.1  # seconds between two pieces that are sent at a limited rate
SLICE_INTERVAL = 0.001  # seconds between two pieces: a peer that reads promptly receives each of them alone
NONE = "none"  # the specification of a connection without a fault

Range = tuple[float, float]

ENDS = {end.value: end for end in End}
REFUSE, NO_ACCEPT, DROP = "refuse", "no-accept", "drop"
DATAGRAM_KINDS = (DROP, "delay", "corrupt", "duplicate")
FINAL_KINDS = (*ENDS, REFUSE, NO_ACCEPT)  # of which a fault has at most one
SINGLE_KINDS = (DROP, REFUSE, NO_ACCEPT)  # there are no replies that another kind could change
VALUES = {
    "delay": f"seconds from 0 to {MAX_DELAY:.0f}, or a range such as 0.05..0.2",
    "rate": "bytes per second, an integer from 1",
    "slice": "bytes, an integer from 1, or a range such as 1..3",
    "garbage": f"bytes, an integer from 1 to {MAX_GARBAGE}",
    **dict.fromkeys(ENDS, "bytes of replies, an integer from 0, or a time such as 2s"),
    "interval": f"seconds from 0 to {MAX_DELAY:.0f}",
    "repeat": f"copies of each reply, an integer from 1 to {MAX_REPEAT}",
    "after": "messages, an integer from 0",
    "p": "a share of the connections from 0 to 1",
}
KINDS = ("delay", "rate", "slice", DROP, "corrupt", "duplicate", "garbage", *FINAL_KINDS)
PARAMETERS = {"interval": "slice", "repeat": "duplicate", "after": "", "p": ""}  # of which kind, "" for any
CHOICES = ", ".join([*KINDS, *PARAMETERS, NONE])
RANGES = ("delay", "slice")
LOWEST = {"rate": 1, "slice": 1, "garbage": 1, "repeat": 1}
HIGHEST = {"delay": MAX_DELAY, "interval": MAX_DELAY, "p": 1.0, "garbage": MAX_GARBAGE, "repeat": MAX_REPEAT}


@dataclass(frozen=True, slots=True)
class Fault:
    """One specification: the range of values of each kind and parameter, ``(0, 0)`` for those without.

    ``end_time`` is the seconds from the acceptance to the end, None if it depends on the bytes of replies.
    """

    values: dict[str, Range]
    texts: dict[str, str]
    end_time: float | None = None

    @property
    def probability(self) -> float:
        return self.values.get("p", (1.0, 1.0))[0]

    @property
    def end(self) -> str | None:
        """The kind that ends the replies or the connection, if there is one."""
        return next((kind for kind in FINAL_KINDS if kind in self.values), None)

    def report(self, kind: str) -> Report:
        """Return the report that ``kind`` takes effect."""
        return Report(kind, f"fault injected: {self.texts[kind]}")


def parse_fault(spec: str) -> Fault | None:
    """Parse ``KIND[=VALUE],...``; None for ``none``. :exc:`ValueError` names what is invalid, and what is allowed."""
    if spec.strip() == NONE:
        return None
    values: dict[str, Range] = {}
    texts: dict[str, str] = {}
    end_time = None
    for part in spec.split(","):
        kind, separator, text = part.strip().partition("=")
        if kind == NONE:
            raise ValueError(f"{NONE} stands alone, for no fault")
        if not kind:
            raise ValueError(f"fault kind missing; choose from {CHOICES}")
        if ";" in part:
            raise ValueError("semicolons separate the connections of a sequence: use fault_sequence")
        if kind not in KINDS and kind not in PARAMETERS:
            raise ValueError(f"unknown fault kind {kind!r}; choose from {CHOICES}")
        if kind in values:
            raise ValueError(f"{kind} is given twice; semicolons separate the connections of a sequence")
        if kind in ENDS and text.endswith("s"):
            end_time, _ = values[kind] = _parse_range(kind, [text.removesuffix("s")], float, 0, MAX_DELAY)
        else:
            values[kind] = _parse_value(kind, text if separator else None)
        texts[kind] = part.strip()
    _check_combination(list(values), end_time is not None)
    return Fault(values, texts, end_time)


def parse_sequence(sequence: str | Sequence[str | None]) -> list[Fault | None]:
    """Parse specifications, separated by semicolons or as a list, in which None stands for ``none``.

    :exc:`ValueError` if one is invalid, or ``no-accept``, which applies to a whole listener.
    """
    specs = sequence.split(";") if isinstance(sequence, str) else sequence
    faults = [parse_fault(NONE if spec is None else spec.strip()) for spec in specs]
    if any(fault is not None and fault.end == NO_ACCEPT for fault in faults):
        raise ValueError(f"{NO_ACCEPT} applies to all connections, not to one of a sequence")
    return faults


def _parse_value(kind: str, text: str | None) -> Range:
    """Return the range of values in ``text``, which is None if there is no ``=``."""
    if kind not in VALUES:
        if text is None:
            return 0, 0
        raise ValueError(f"{kind} takes no value")
    if text is None and kind in ENDS:
        return 0, 0
    parts = (text or "").split("..") if kind in RANGES else [text or ""]
    convert = float if kind in ("delay", "interval", "p") else _parse_integer
    return _parse_range(kind, parts, convert, LOWEST.get(kind, 0), HIGHEST.get(kind, MAX_REPLY_BYTES))


def _parse_range(kind: str, parts: list[str], convert: Callable[[str], float], low: float, high: float) -> Range:
    try:
        numbers = [convert(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not low <= numbers[0] <= numbers[-1] <= high:
        raise ValueError(f"{kind} requires {VALUES[kind]}")
    return numbers[0], numbers[-1]


def _parse_integer(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):  # int() takes spaces, signs and underscores
        raise ValueError
    return int(text)


def _check_combination(names: list[str], has_end_time: bool) -> None:
    kinds = [name for name in names if name in KINDS]
    parameters = [name for name in names if name in PARAMETERS]
    if not kinds:
        raise ValueError(f"{parameters[0]} requires a kind; choose from {', '.join(KINDS)}")
    for parameter in parameters:
        if PARAMETERS[parameter] and PARAMETERS[parameter] not in kinds:
            raise ValueError(f"{parameter} requires {PARAMETERS[parameter]}")
    final = [kind for kind in kinds if kind in FINAL_KINDS]
    if len(final) > 1:
        raise ValueError(f"{final[0]} and {final[1]} are mutually exclusive")
    for single in SINGLE_KINDS:
        if single in kinds and len(kinds) > 1:
            other = next(kind for kind in kinds if kind != single)
            raise ValueError(f"{single} and {other} are mutually exclusive")
    if "p" in names and kinds == [NO_ACCEPT]:
        raise ValueError(f"{NO_ACCEPT} applies to all connections and takes no probability (p)")
    if "after" in names and (has_end_time or kinds[0] in (REFUSE, NO_ACCEPT)):
        raise ValueError(f"after and {'a time' if has_end_time else kinds[0]} are mutually exclusive")
    if {"interval", "rate"} <= {*names}:
        raise ValueError("interval and rate are mutually exclusive")


class FaultPlan(NamedTuple):
    """The fault of one connection, and where its random choices come from."""

    fault: Fault
    random: Random


class FaultSchedule:
    """Which connections of a server have a fault: those of the ``sequence`` first, then ``fault``.

    Used by one thread at a time. All random choices come from ``seed``, by default a random number.
    """

    def __init__(self, fault: str | None, sequence: str | Sequence[str | None] | None, seed: int | None) -> None:
        self._fault = None if fault is None else parse_fault(fault)
        self._sequence = [] if sequence is None else parse_sequence(sequence)
        self.seed = Random().getrandbits(32) if seed is None else seed
        self.connections = 0  # so far

    def next_plan(self) -> FaultPlan | None:
        """Return the plan of the next connection, None if it has no fault."""
        self.connections += 1
        number = self.connections
        fault = self._sequence[number - 1] if number <= len(self._sequence) else self._fault
        if fault is None:
            return None
        random = Random(f"{self.seed}:{number}")
        return FaultPlan(fault, random) if random.random() < fault.probability else None


class FaultScript:
    """Applies the fault of a connection to the replies of another script.

    In ``raw`` mode replies have no newline that would have to stay.
    """

    def __init__(self, plan: FaultPlan, inner: Script, *, is_raw: bool = False) -> None:
        self._fault, self._random = plan
        self._inner = inner
        self._is_raw = is_raw
        self._reported: set[str] = set()
        self._spared = int(self._value("after", 0))  # messages that are still to be answered without the fault
        self._sent = 0  # bytes of other replies
        self.is_silent = DROP in self._fault.values and not self._spared
        self._end = ENDS.get(self._fault.end or "")
        has_limit = self._end is not None and self._fault.end_time is None
        self._limit = self._value(self._fault.end or "", math.inf) if has_limit else math.inf

    def start(self) -> Iterator[Action]:
        """Yield the actions before the first reply: a connection that stalls after 0 bytes stalls at once."""
        if self._fault.end_time is not None:
            yield Timer(self._fault.end_time, self._finish)
        if self._spared:
            yield from self._inner.start()
        elif self._is_stall_due():
            yield from self._finish()
        else:
            yield from self._apply(self._inner.start())

    def reply(self, data: bytes) -> Iterator[Action]:
        for message in [data] if self._is_raw else split_messages(data):
            if self._spared:
                yield from self._spare(message)
            else:
                yield from self._apply(self._inner.reply(message))

    def _spare(self, message: bytes) -> Iterator[Action]:
        """Yield what happens without the fault, for one of the first messages."""
        yield from self._inner.reply(message)
        self._spared -= 1
        self.is_silent = DROP in self._fault.values and not self._spared
        if not self._spared and self._is_stall_due():
            yield from self._finish()

    def reply_datagram(self, data: bytes) -> Iterator[Action]:
        """Yield the actions that take the place of sending ``data`` as a datagram. Only ``DATAGRAM_KINDS`` apply."""
        if self._spared:
            yield Send(data)
            return
        yield from self._report_new(*(kind for kind in DATAGRAM_KINDS if data or kind != "corrupt"))
        if self.is_silent:
            return
        if "delay" in self._fault.values:
            yield Wait(self._value("delay"))
        if "corrupt" in self._fault.values and data:
            data = self._flip_bit(data)
        for _ in range(self._copies()):
            yield Send(data)

    def _copies(self) -> int:
        return int(self._value("repeat", 2)) if "duplicate" in self._fault.values else 1

    def _is_stall_due(self) -> bool:
        return self._end is End.STALL and self._limit == 0

    def _apply(self, actions: Iterator[Action]) -> Iterator[Action]:
        for action in actions:
            if self._end is not None and self._end.value in self._reported:
                return  # nothing more is sent
            if isinstance(action, Send):
                yield from self._reply(action.data)
            else:
                yield action

    def _reply(self, reply: bytes) -> Iterator[Action]:
        yield from self._report_new(DROP, "delay", "garbage", "corrupt", "duplicate")
        if self.is_silent:
            return
        if "delay" in self._fault.values:
            yield Wait(self._value("delay"))
        if "garbage" in self._fault.values:
            reply = self._random.randbytes(int(self._value("garbage")) - 1).replace(b"\n", b"\r") + b"\n"
        if "corrupt" in self._fault.values:
            reply = self._flip_bit(reply)
        reply *= self._copies()
        yield from self._send(reply[: int(min(self._limit - self._sent, len(reply)))])
        if self._sent >= self._limit:
            yield from self._finish()

    def _send(self, data: bytes) -> Iterator[Action]:
        """Yield ``data`` in pieces, each after the time that it takes at the limited rate."""
        if not data:
            return
        yield from self._report_new("rate", "slice")
        rate = self._value("rate", math.inf)
        most = MAX_REPLY_BYTES if rate == math.inf else max(1, int(rate * RATE_INTERVAL))
        start = 0
        while start < len(data):
            piece = data[start : start + int(self._value("slice", most))]
            if rate < math.inf:
                yield Wait(len(piece) / rate)
            elif start:
                yield Wait(self._value("interval", SLICE_INTERVAL))
            start += len(piece)
            self._sent += len(piece)
            yield Send(piece)

    def _report_new(self, *kinds: str) -> Iterator[Action]:
        for kind in kinds:
            if kind in self._fault.values and kind not in self._reported:
                yield self._report(kind)

    def _report(self, kind: str) -> Report:
        self._reported.add(kind)
        return self._fault.report(kind)

    def _finish(self) -> Iterator[Action]:
        assert self._end is not None
        yield self._report(self._end.value)
        yield self._end

    def _value(self, kind: str, default: float = 0.0) -> float:
        """Draw a value of ``kind`` from its range; ``default`` if it is not given."""
        low, high = self._fault.values.get(kind, (default, default))
        if low == high:
            return low
        return self._random.uniform(low, high) if kind == "delay" else self._random.randint(int(low), int(high))

    def _flip_bit(self, reply: bytes) -> bytes:
        """Flip one bit. The framing stays: no newline is removed or made, except from an empty message."""
        has_newline = not self._is_raw and len(reply) > 1
        index, bit = self._random.randrange(len(reply) - has_newline), self._random.randrange(8)
        changed = bytearray(reply)
        if has_newline and changed[index] ^ 1 << bit == ord("\n"):
            bit = (bit + 1) % 8
        changed[index] ^= 1 << bit
        return bytes(changed)
