"""The time limits of a connection and the counters of a server, with a clock that the test sets."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest

from echo_async import ServerConfig, Stats
from echo_async.config import Mode
from echo_async.engines.admission import Admission
from echo_async.engines.connection import Connection
from echo_async.engines.context import LINGER_TIMEOUT, LINGER_TIMEOUT_AT_STOP
from echo_async.engines.registry import Registry

IDLE, MESSAGE, WRITE = 600.0, 60.0, 30.0


class Clocked(Registry):
    """A registry whose time passes only when the test says so."""

    time = 1000.0

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config)
        self.context.now = lambda: self.time


class Client(Connection):
    """A connection without a socket: the test says what is stuck in it."""

    def __init__(self, registry: Clocked) -> None:
        super().__init__(registry.context, None)
        self.clock = registry
        self.stuck = 0
        self.ended: list[str] = []
        registry.add(self)

    def unsent(self) -> int:
        return self.stuck

    def finish(self) -> None:
        self.conversation.finish()
        self.ended.append("finish")

    def stop(self) -> None:
        self.conversation.stop()
        self.ended.append("stop")

    def abort(self) -> None:
        self.ended.append("abort")
        self.clock.remove(self)

    def sends(self, data: bytes) -> None:
        self.conversation.receive(data)

    def after(self, seconds: float) -> str | None:
        """Let that much time pass, with a sweep each half second; what is expired_timeout first."""
        for _ in range(int(seconds * 2)):
            self.clock.time += 0.5
            if expired_timeout := self.expired_timeout(self.clock.time):
                return expired_timeout
        return None


def client(mode: Mode = "stream") -> Client:
    return Client(Clocked(ServerConfig(mode=mode)))


@pytest.mark.parametrize("mode", ["message", "stream", "raw"])
def test_idle_timeout_expires_after_exactly_its_time(mode: Mode) -> None:
    silent = client(mode)
    assert silent.after(IDLE - 0.5) is None
    assert silent.after(0.5) == "idle"


@pytest.mark.parametrize("mode", ["stream", "raw"])
def test_idle_timeout_restarts_with_any_input(mode: Mode) -> None:
    active = client(mode)
    for _ in range(5):
        assert active.after(IDLE - 1) is None
        active.sends(b"\n")
    assert active.after(IDLE) is None
    assert active.after(0.5) == "idle"


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_message_timeout_ignores_progress_within_a_message(mode: Mode) -> None:
    slow = client(mode)
    expired_timeout, seconds = None, 0
    while expired_timeout is None:
        slow.sends(b".")
        expired_timeout = slow.after(1)
        seconds += 1
    assert expired_timeout == "message"
    assert MESSAGE <= seconds <= MESSAGE + 1


def test_incomplete_message_is_not_subject_to_idle_timeout() -> None:
    registry = Clocked(ServerConfig(timeout_idle=5, timeout_message=60))
    slow = Client(registry)
    slow.sends(b"begun")
    assert slow.after(59) is None
    assert slow.after(2) == "message"


def test_message_timeout_restarts_with_each_message() -> None:
    slow = client()
    slow.sends(b"a message that is begun")
    for _ in range(5):
        assert slow.after(MESSAGE - 1) is None
        slow.sends(b" and finished\nand the next, begun in the same packet")
    assert slow.after(MESSAGE + 1) == "message"


def test_idle_timeout_starts_at_the_end_of_a_message() -> None:
    slow = Client(Clocked(ServerConfig(mode="stream", timeout_idle=10)))
    slow.sends(b"begun")
    assert slow.after(50) is None
    slow.sends(b", finished\n")
    assert slow.after(10) is None
    assert slow.after(0.5) == "idle"


def test_message_timeout_in_raw_mode_does_not_apply() -> None:
    talking = client("raw")
    talking.sends(b"never a newline")
    assert talking.after(IDLE) is None


def test_write_timeout_without_progress_expires() -> None:
    deaf = client("raw")
    deaf.sends(b"x" * 1000)
    deaf.stuck = 1000
    assert deaf.after(WRITE - 1) is None
    assert deaf.after(2) == "write"


def test_write_timeout_starts_with_the_first_unsent_byte() -> None:
    deaf = client()
    assert deaf.after(500) is None
    deaf.sends(b"one\n")
    deaf.stuck = 4
    assert deaf.after(WRITE - 1) is None
    assert deaf.after(2) == "write"


def test_write_timeout_restarts_with_any_progress() -> None:
    slow = client("raw")
    slow.sends(b"x" * 1000)
    slow.stuck = 1000
    for _ in range(5):
        assert slow.after(WRITE - 1) is None
        slow.stuck -= 1
    assert slow.after(WRITE + 1) == "write"


def test_write_timeout_ignores_additional_output() -> None:
    deaf = client("raw")
    deaf.sends(b"x" * 1000)
    deaf.stuck = 1000
    assert deaf.after(WRITE - 1) is None
    deaf.sends(b"y" * 1000)
    deaf.stuck += 1000
    assert deaf.after(2) == "write"


def test_write_timeout_suspends_the_other_timeouts() -> None:
    registry = Clocked(ServerConfig(mode="stream", timeout_idle=5, timeout_message=5, timeout_write=30))
    slow, begun, ended = Client(registry), Client(registry), Client(registry)
    for each in (slow, begun, ended):
        each.sends(b"one\n")
    begun.sends(b"begun")
    ended.conversation.receive_eof()
    for each in (slow, begun, ended):
        each.after(1)
        each.stuck = 4
        assert each.after(29) is None
        each.stuck = 0
        assert each.after(4) is None
    assert slow.after(1.5) == "idle"
    assert begun.after(1.5) == "message"
    assert ended.after(1.5) == "linger"


def test_linger_timeout_expires_after_the_last_reply() -> None:
    done = client("message")
    done.sends(b"one\n")
    assert done.after(LINGER_TIMEOUT) is None
    assert done.after(0.5) == "linger"


def test_linger_timeout_ignores_discarded_input() -> None:
    chatty = client("message")
    chatty.sends(b"one\n")
    expired_timeout, seconds = None, 0.0
    while expired_timeout is None:
        chatty.sends(b"and on\n")
        expired_timeout = chatty.after(0.5)
        seconds += 0.5
    assert expired_timeout == "linger"
    assert LINGER_TIMEOUT <= seconds <= LINGER_TIMEOUT + 1


def test_linger_timeout_during_shutdown_is_shorter() -> None:
    done = client("message")
    done.sends(b"one\n")
    done.clock.stop()
    assert done.ended == ["stop"]
    assert done.expired_timeout(done.clock.time) is None
    assert done.after(LINGER_TIMEOUT_AT_STOP) == "linger"


def test_timeouts_with_an_active_client_never_expire() -> None:
    active = client()
    for number in range(2000):
        active.sends(b"a whole message, and another that is beg")
        active.stuck = 20 * (number % 2)
        assert active.after(0.5) is None
        active.sends(b"un\n")
        active.stuck = 0
        assert active.after(9.5) is None
    assert active.conversation.messages == 2000


def test_sweep_closes_and_counts_expired_connections(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    registry = Clocked(ServerConfig(mode="stream", timeout_idle=60, timeout_message=60, timeout_write=60))
    idle, begun, deaf, active = (Client(registry) for _ in range(4))
    begun.sends(b"begun")
    deaf.sends(b"one\n")
    deaf.stuck = 4
    for _ in range(61):
        registry.time += 1
        active.sends(b"one\n")
        registry.sweep()
    assert (idle.ended, begun.ended, deaf.ended, active.ended) == (["finish"], ["finish"], ["abort"], [])
    stats = registry.stats
    assert (stats.timeouts_idle, stats.timeouts_message, stats.timeouts_write) == (1, 1, 1)
    for _ in range(int(LINGER_TIMEOUT) + 2):
        registry.time += 1
        active.sends(b"one\n")
        registry.sweep()
    assert registry.connections == {active}
    assert (idle.ended, begun.ended) == (["finish", "abort"], ["finish", "abort"])
    assert registry.stats.timeouts_idle == 1
    said = [record.getMessage() for record in caplog.records]
    assert sorted(line for line in said if " closed: " in line) == [
        "a client that is gone closed: a message was begun and not finished in 60 s",
        "a client that is gone closed: it read nothing of what it was sent for 60 s",
        "a client that is gone closed: nothing received for 60 s",
    ]


def test_sweep_interval_fits_the_shortest_timeout() -> None:
    assert Registry(ServerConfig()).sweep_interval == 1
    assert Registry(ServerConfig(timeout_write=0.5)).sweep_interval <= 0.05


def test_sweep_with_a_failing_connection_aborts_only_it(caplog: pytest.LogCaptureFixture) -> None:
    registry = Clocked(ServerConfig(mode="stream"))

    class Broken(Client):
        def unsent(self) -> int:
            raise AttributeError("broken")

    clients = [Client(registry), Broken(registry), Client(registry)]
    registry.time += IDLE
    registry.sweep()
    assert [client.ended for client in clients] == [["finish"], ["abort"], ["finish"]]
    assert registry.stats.failed == 1
    assert "broken" in caplog.text


def test_stats_include_open_and_closed_connections() -> None:
    registry = Clocked(ServerConfig(mode="stream", limit_message_size=20))
    whole, begun, long, open = (Client(registry) for _ in range(4))
    whole.sends(b"one\ntwo\n")
    begun.sends(b"three\nbegun")
    long.sends(b"x" * 30)
    open.sends(b"four\nfive")
    before = registry.stats
    assert before == Stats(accepted=4, active=4, messages=4, bytes_in=58, bytes_out=19, too_long=1)
    for each in (whole, begun, long):
        registry.remove(each)
        registry.remove(each)  # the second time is none
    assert registry.stats == Stats(accepted=4, active=1, messages=4, bytes_in=58, bytes_out=19, lost=1, too_long=1)
    registry.remove(open)
    assert registry.stats == Stats(accepted=4, active=0, messages=4, bytes_in=58, bytes_out=19, lost=2, too_long=1)


def test_stats_are_a_snapshot() -> None:
    registry = Clocked(ServerConfig())
    Client(registry).sends(b"one\n")
    before = registry.stats
    registry.abort()
    assert before.active == 1
    assert registry.stats.active == 0


def test_stats_of_two_servers_can_be_added() -> None:
    both = Stats(accepted=2, messages=3, bytes_in=10) + Stats(accepted=1, active=1, bytes_in=5)
    assert both == Stats(accepted=3, active=1, messages=3, bytes_in=15)
    assert str(both).startswith("accepted=3 active=1 refused=0 ")


def test_on_empty_is_called_once_by_the_last_connection() -> None:
    registry = Clocked(ServerConfig())
    calls: list[int] = []
    registry.on_empty = lambda: calls.append(len(registry.connections))
    first, second = Client(registry), Client(registry)
    registry.remove(first)
    assert calls == []
    registry.remove(second)
    registry.remove(second)
    assert calls == [0]


def test_timeout_counted_once_while_thread_ends() -> None:
    """A thread may need some time to close an aborted connection, which is swept meanwhile."""
    registry = Clocked(ServerConfig(mode="stream"))

    class Slow(Client):
        def abort(self) -> None:
            self.ended.append("abort")

    slow = Slow(registry)
    slow.sends(b"one\n")
    slow.stuck = 4
    registry.sweep()
    for _ in range(3):
        registry.time += WRITE
        registry.sweep()
    assert slow.ended == ["abort"] * 3
    assert registry.stats.timeouts_write == 1


def test_refused_connections_are_counted_and_rate_limited(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = 1000.0
    monkeypatch.setattr("echo_async.logs.time", SimpleNamespace(monotonic=lambda: seconds))
    registry = Clocked(ServerConfig(limit_connections=2))
    admission = Admission(registry)
    assert admission.admit()
    first = Client(registry)
    assert admission.admit()
    Client(registry)
    for _ in range(1000):  # over 10 seconds
        assert not admission.admit()
        seconds += 0.01
    assert registry.stats.refused == 1000
    assert caplog.messages[0] == "refused a client: 2 are connected, the limit"
    assert 9 <= len(caplog.messages) - 1 <= 10
    assert all(
        re.fullmatch(r"refused a client: 2 are connected, the limit \(1\d\d times since the last such line\)", line)
        for line in caplog.messages[1:]
    )
    registry.remove(first)
    assert admission.admit()
    assert registry.stats.refused == 1000


def test_connection_limit_defaults_to_the_descriptor_limit() -> None:
    assert 1 <= Admission(Registry(ServerConfig())).limit <= 2**31
    assert Admission(Registry(ServerConfig(limit_connections=7))).limit == 7
