"""Timeouts of a connection and counters of a server, with a fake clock and connections without sockets."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_async import ServerConfig, Stats
from echo_async.config import Mode
from echo_async.engines.connection import Connection
from echo_async.engines.context import LINGER_TIMEOUT, LINGER_TIMEOUT_AT_STOP, Slot
from echo_async.engines.timeouts import Timeouts
from echo_async.server.admission import Admission
from echo_async.server.registry import Registry

IDLE, MESSAGE, WRITE = 20.0, 60.0, 30.0


class FakeClockRegistry(Registry):
    """A registry whose clock only the test advances."""

    time = 1000.0

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config)
        self.now = lambda: self.time


class FakeConnection(Connection):
    """A connection without a socket. The test sets ``unsent_bytes``; ``calls`` records what the registry does."""

    is_swept_briefly = True

    def __init__(self, registry: FakeClockRegistry) -> None:
        super().__init__(registry, Slot())
        self.clock = registry
        self.unsent_bytes = 0
        self.calls: list[str] = []
        self.establish()
        self.check()  # as the first sweep, which starts the clock

    def get_extra_info(self, name: str) -> Any:
        return None

    def unsent(self) -> int:
        return self.unsent_bytes

    def linger(self) -> None:
        self.conversation.end_input()
        self.calls.append("linger")

    def drain(self) -> None:
        self.conversation.drain()
        self.calls.append("drain")

    def abort(self, *, reset: bool = False) -> None:
        self.calls.append("abort")
        self.clock.remove(self)

    def receive(self, data: bytes) -> None:
        self.conversation.receive(data)

    def advance(self, seconds: float) -> str | None:
        """Advance the clock in steps of half a second. Return the first timeout that expires."""
        for _ in range(int(seconds * 2)):
            self.clock.time += 0.5
            if expired := self.check():
                return expired
        return None

    def check(self) -> str | None:
        """Check the timeouts as the sweep of the asyncio engines does."""
        self.timeouts = self.timeouts or Timeouts()
        seconds = self.context.config.timeout_idle
        if self.is_swept_briefly and self.timeouts.is_still_idle(self.conversation, self.clock.time, seconds):
            return None
        return self.timeouts.expired(self.clock.time, *self.observe())

    def expire(self, flood: bytes = b"") -> tuple[str, float]:
        """Receive ``flood`` every half second. Return the first timeout that expires, and the seconds until then."""
        start = self.clock.time
        while True:
            if flood:
                self.receive(flood)
            if expired := self.advance(0.5):
                return expired, self.clock.time - start


class Unsent(NamedTuple):
    """The bytes of replies that the kernel has not taken."""

    size: int


Step = bytes | float | Unsent


class Case(NamedTuple):
    """What happens to a connection, which waits between, without a timeout, and the one that expires after it."""

    mode: Mode
    steps: Sequence[Step]
    expired: str
    seconds: float  # after the last step
    flood: bytes = b""  # received all the time after the last step


SLOW_WRITE: list[Step] = [Unsent(4), WRITE - 1, Unsent(3), WRITE - 1, Unsent(2), WRITE - 1]  # takes 87 s

CASES = {
    "idle": Case("stream", [], "idle", IDLE),
    "idle, message": Case("message", [], "idle", IDLE),
    "idle, raw": Case("raw", [b"never a newline"], "idle", IDLE + 0.5),  # seen by the next sweep
    "idle restarts with input": Case("stream", 5 * (IDLE - 1, b"\n"), "idle", IDLE + 0.5),
    "idle restarts with input, raw": Case("raw", 5 * (IDLE - 1, b"x"), "idle", IDLE + 0.5),
    "idle starts at the end of a message": Case("stream", [b"begun", MESSAGE - 1, b"\n"], "idle", IDLE + 0.5),
    "message": Case("message", [], "message", MESSAGE + 0.5, flood=b"."),
    "message, not idle": Case("stream", [IDLE - 1, b"begun"], "message", MESSAGE + 0.5),
    "message, despite progress": Case("stream", [], "message", MESSAGE + 0.5, flood=b"."),
    "message restarts with each": Case("stream", (b"1", *5 * (MESSAGE - 1, b"\n2")), "message", MESSAGE + 0.5),
    "write": Case("raw", [1000 * b"x", Unsent(1000)], "write", WRITE + 0.5),
    "write starts with the first unsent byte": Case("stream", [IDLE - 1, b"one\n", Unsent(4)], "write", WRITE + 0.5),
    "write restarts with progress": Case("raw", [b"xxxx", *SLOW_WRITE], "write", 1.5),
    "write ignores more output": Case("raw", [b"x", Unsent(1), WRITE - 1, b"y", Unsent(2)], "write", 1.5),
    "write suspends idle": Case("stream", [b"one\n", *SLOW_WRITE, Unsent(0)], "idle", IDLE + 0.5),
    "write suspends message": Case("stream", [b"one\nbegun", *SLOW_WRITE, Unsent(0)], "message", MESSAGE + 0.5),
    "write suspends linger": Case("message", [b"one\n", *SLOW_WRITE, Unsent(0)], "linger", LINGER_TIMEOUT + 0.5),
    "linger": Case("message", [b"one\n"], "linger", LINGER_TIMEOUT + 0.5),
    "linger, despite input": Case("message", [b"one\n"], "linger", LINGER_TIMEOUT + 0.5, flood=b"more\n"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_timeout_expires_after_exactly_its_time(case: Case) -> None:
    connection = FakeConnection(FakeClockRegistry(ServerConfig(mode=case.mode, timeout_idle=IDLE)))
    for step in case.steps:
        if isinstance(step, bytes):
            connection.receive(step)
        elif isinstance(step, Unsent):
            connection.unsent_bytes = step.size
        else:
            assert connection.advance(step) is None
    assert connection.expire(case.flood) == (case.expired, case.seconds)


def test_missing_newline_is_logged_once_before_the_timeout(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_async.server")
    registry = FakeClockRegistry(ServerConfig(mode="stream"))
    waiting, done = FakeConnection(registry), FakeConnection(registry)
    waiting.receive(b"Hola Server!")
    done.receive(b"Hola Server!\n")
    for _ in range(int(MESSAGE) - 1):
        registry.time += 1
        registry.sweep()
    text = "disconnected client incomplete message for 5 s: 12 bytes received, waiting for a newline"
    assert [each.getMessage() for each in caplog.records] == [text]
    waiting.receive(b"\nand another")
    registry.time += MESSAGE / 2
    registry.sweep()
    assert len(caplog.records) == 1


def test_linger_timeout_during_shutdown_is_shorter() -> None:
    done = FakeConnection(FakeClockRegistry(ServerConfig()))
    done.receive(b"one\n")
    done.clock.drain()
    assert done.calls == ["drain"]
    assert done.check() is None
    assert done.advance(LINGER_TIMEOUT_AT_STOP) == "linger"


MESSAGES = st.sampled_from([b"", b"one\n", b"begun", b"first\nsecond begun"])


@given(st.lists(st.tuples(MESSAGES, st.integers(0, 4), st.sampled_from([0.5, 3.0, 7.0])), max_size=20))
def test_check_of_idle_connections_equals_the_full_check(steps: list[tuple[bytes, int, float]]) -> None:
    options = ServerConfig(mode="stream", timeout_idle=10, timeout_message=6, timeout_write=5)
    swift, full = (FakeConnection(FakeClockRegistry(options)) for _ in range(2))
    full.is_swept_briefly = False
    for data, unsent, seconds in steps:
        for each in (swift, full):
            if data:
                each.receive(data)
            each.unsent_bytes = unsent if data else min(unsent, each.unsent_bytes)
        assert swift.advance(seconds) == full.advance(seconds)


def test_sweep_closes_and_counts_expired_connections(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    registry = FakeClockRegistry(ServerConfig(mode="stream", timeout_idle=60, timeout_message=60, timeout_write=60))
    idle, incomplete, stalled, active = (FakeConnection(registry) for _ in range(4))
    incomplete.receive(b"begun")
    stalled.receive(b"one\n")
    stalled.unsent_bytes = 4
    for _ in range(61):
        registry.time += 1
        active.receive(b"one\n")
        registry.sweep()
    assert (idle.calls, incomplete.calls, stalled.calls, active.calls) == (["linger"], ["linger"], ["abort"], [])
    stats = registry.stats
    assert (stats.timeouts_idle, stats.timeouts_message, stats.timeouts_write) == (1, 1, 1)
    for _ in range(int(LINGER_TIMEOUT) + 2):
        registry.time += 1
        active.receive(b"one\n")
        registry.sweep()
    assert registry.connections == {active}
    assert (idle.calls, incomplete.calls) == (["linger", "abort"], ["linger", "abort"])
    assert registry.stats.timeouts_idle == 1
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(line for line in lines if " timeout (" in line) == [
        "disconnected client idle timeout (60 s)",
        "disconnected client message timeout (60 s): incomplete message",
        "disconnected client write timeout (60 s): peer is not reading",
    ]


def test_sweep_interval_fits_the_shortest_timeout() -> None:
    assert Registry(ServerConfig()).sweep_interval == 1
    assert Registry(ServerConfig(timeout_write=0.5)).sweep_interval <= 0.05


@pytest.mark.internal_errors
def test_sweep_with_a_failing_connection_aborts_only_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = FakeClockRegistry(ServerConfig(mode="stream", timeout_idle=IDLE))
    clients = [FakeConnection(registry) for _ in range(3)]
    monkeypatch.setattr(clients[1], "unsent", None)
    registry.time += IDLE
    registry.sweep()
    assert [client.calls for client in clients] == [["linger"], ["abort"], ["linger"]]
    assert registry.stats.failed == 1
    assert "'NoneType' object is not callable" in caplog.text


def test_stats_include_open_and_closed_connections() -> None:
    registry = FakeClockRegistry(ServerConfig(mode="stream", limit_message_size=20))
    complete, incomplete, long, open = (FakeConnection(registry) for _ in range(4))
    complete.receive(b"one\ntwo\n")
    incomplete.receive(b"three\nbegun")
    long.receive(b"x" * 30)
    open.receive(b"four\nfive")
    before = registry.stats
    assert before == Stats(accepted=4, active=4, messages=4, bytes_in=58, bytes_out=19, too_long=1)
    for each in (complete, incomplete, long):
        registry.remove(each)
        registry.remove(each)  # has no effect the second time
    ended = {"lost": 1, "too_long": 1, "closed": 1}
    counts: Any = {"accepted": 4, "messages": 4, "bytes_in": 58, "bytes_out": 19, "too_long": 1}
    assert registry.stats == Stats(**counts, active=1, lost=1, ended=ended)
    registry.remove(open)
    assert registry.stats == Stats(**counts, active=0, lost=2, ended={**ended, "lost": 2})


def test_on_empty_is_called_once_by_the_last_connection() -> None:
    registry = FakeClockRegistry(ServerConfig())
    calls: list[int] = []
    registry.on_empty = lambda: calls.append(len(registry.connections))
    first, second = FakeConnection(registry), FakeConnection(registry)
    registry.remove(first)
    assert calls == []
    registry.remove(second)
    registry.remove(second)
    assert calls == [0]


def test_timeout_counted_once_while_thread_ends() -> None:
    """A thread may need some time to close an aborted connection, which is swept meanwhile."""
    registry = FakeClockRegistry(ServerConfig(mode="stream"))

    class Slow(FakeConnection):
        def abort(self, *, reset: bool = False) -> None:
            self.calls.append("abort")

    slow = Slow(registry)
    slow.receive(b"one\n")
    slow.unsent_bytes = 4
    registry.sweep()
    for _ in range(3):
        registry.time += WRITE
        registry.sweep()
    assert slow.calls == ["abort"] * 3
    assert registry.stats.timeouts_write == 1


def test_refused_connections_are_counted_and_rate_limited(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = 1000.0
    monkeypatch.setattr("echo_async.logs.time", SimpleNamespace(monotonic=lambda: seconds))
    registry = FakeClockRegistry(ServerConfig(limit_connections=2))
    admission = Admission(registry)
    assert admission.has_place()
    first = FakeConnection(registry)
    assert admission.has_place()
    FakeConnection(registry)
    for _ in range(1000):  # over 10 seconds
        assert not admission.has_place()
        seconds += 0.01
    assert registry.stats.refused == 1000
    assert caplog.messages[0] == "connection limit reached (2), connection refused"
    assert 9 <= len(caplog.messages) - 1 <= 10
    assert all(
        re.fullmatch(r"connection limit reached \(2\), connection refused \(repeated 1\d\d times\)", line)
        for line in caplog.messages[1:]
    )
    registry.remove(first)
    assert admission.has_place()
    assert registry.stats.refused == 1000
