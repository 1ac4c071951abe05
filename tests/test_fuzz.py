"""Fuzz: whatever comes in, in whatever pieces and at whatever moment, only what is documented comes out.

Once for the rules alone, as a state machine beside a model that is too simple to be wrong; and once for running
servers, which meet clients that do anything a client can do.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import BACKENDS, Backend, ServerThread, connect, is_echoed, receive_all, reset, wait_until

import echo_async
from echo_async.config import Mode
from echo_async.conversation import Conversation, conversation

MODES: list[Mode] = ["message", "stream", "raw"]

# Bytes in which newlines are frequent, and all the others possible.
BYTES = st.lists(st.one_of(st.just(b"\n"), st.binary(max_size=12), st.just(b"x" * 40)), max_size=12).map(b"".join)
SHORT = [b"\n", b"a", b"ab", b"a\n", b"a\nb", b"\na\n", b"one\ntwo\n", b"\n\nx", b"x" * 40]
PIECES = st.one_of(st.sampled_from(SHORT), st.sampled_from(SHORT), BYTES.map(lambda data: data or b"a"))
SELDOM = st.integers(0, 5).map(lambda number: number == 5)  # what ends a conversation, so that most go on


def replies(mode: Mode, sent: bytes, limit: int) -> bytes:
    """What is answered to all of ``sent``, by the rules as a person reads them."""
    if mode == "raw":
        return sent
    messages = [message + b"\n" for message in sent.split(b"\n")[:-1]]
    if mode == "message":
        messages = messages[:1]
    answered = b""
    for message in messages:
        if len(message) > limit:
            break
        answered += message
    return answered


class AnyConversation(RuleBasedStateMachine):
    """One client does anything, the server stops or not; beside it, all that was sent in one piece."""

    talk: Conversation

    @initialize(mode=st.sampled_from(MODES), limit=st.sampled_from([1, 2, 3, 40, 500]))
    def begin(self, mode: Mode, limit: int) -> None:
        self.mode, self.limit = mode, limit
        self.talk = conversation(mode, limit)
        self.sent = self.answered = b""
        self.stopped_at: int | None = None  # bytes that had been sent when the server was stopped
        self.ended = False

    @rule(data=PIECES)
    def send(self, data: bytes) -> None:
        finished = self.talk.finished
        reply = self.talk.receive(data)
        self.sent += data
        self.answered += reply
        assert not (finished and reply)

    @rule(really=SELDOM)
    def end(self, really: bool) -> None:
        if not really:
            return
        self.talk.receive_eof()
        self.ended = True
        assert self.talk.finished

    @rule()
    def stop(self) -> None:
        self.talk.stop()
        if self.stopped_at is None:
            self.stopped_at = len(self.sent)

    @rule(really=SELDOM)
    def finish(self, really: bool) -> None:
        if not really:
            return
        self.talk.finish()
        self.ended = True

    def expected(self) -> bytes:
        whole = replies(self.mode, self.sent, self.limit)
        if self.stopped_at is None:
            return whole
        before = replies(self.mode, self.sent[: self.stopped_at], self.limit)
        if self.mode == "raw" or len(before) == self.stopped_at:
            return before  # nothing was begun
        return before + replies("message", whole[len(before) :], self.limit)

    @invariant()
    def only_what_is_documented_comes_out(self) -> None:
        talk = self.talk
        expected = self.expected()
        if self.ended or talk.too_long:
            assert expected.startswith(self.answered)
        else:
            assert self.answered == expected
        assert talk.received == len(self.sent)
        assert talk.answered == len(self.answered)
        assert talk.received == talk.answered + talk.incomplete + talk.discarded
        assert talk.messages == (0 if self.mode == "raw" else self.answered.count(b"\n"))
        assert 0 <= talk.incomplete < self.limit + talk.finished
        assert talk.finished or not talk.too_long
        if self.mode == "raw":
            assert not talk.too_long
            assert not talk.incomplete
        if self.mode == "message" and talk.messages:
            assert talk.finished
            assert talk.messages == 1


TestAnyConversation = AnyConversation.TestCase
TestAnyConversation.settings = settings(max_examples=100, stateful_step_count=20)


# Running servers

LIMIT = 200


@pytest.fixture(params=BACKENDS, ids="-".join, scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[dict[Mode, echo_async.EchoServer]]:
    """A server of each mode, on one engine and loop, for all examples; nothing of them is left in the end."""
    backend: Backend = request.param
    with ExitStack() as servers:
        yield {
            mode: servers.enter_context(
                ServerThread(
                    backend.loop, {"engine": backend.engine, "port": 0, "mode": mode, "limit_message_size": LIMIT}
                )
            )
            for mode in MODES
        }


class FuzzedClient:
    """A client that does one thing after another, and knows what it may get for it."""

    def __init__(self, server: echo_async.EchoServer) -> None:
        self.socket = connect(server)
        self.sent = self.received = b""
        self.broken = False

    def do(self, action: object) -> None:
        with suppress(ConnectionError):
            if isinstance(action, bytes):
                self.socket.sendall(action)
                self.sent += action
            elif action == "read":
                if select.select([self.socket], [], [], 0.002)[0]:
                    self.received += self.socket.recv(100)
            elif action == "end":
                with suppress(OSError):  # it is not connected any more
                    self.socket.shutdown(socket.SHUT_WR)
            return
        self.broken = True

    def leave(self, how: str) -> None:
        if how == "reset":
            reset(self.socket)
        elif how == "read":
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
            try:
                self.received += receive_all(self.socket)
            except ConnectionError:
                self.broken = True
        self.socket.close()


ACTIONS = st.lists(
    st.one_of(BYTES.filter(bool), st.binary(min_size=1, max_size=300), st.sampled_from(["read", "end"])), max_size=8
)
CLIENTS = st.lists(st.tuples(ACTIONS, st.sampled_from(["read", "read", "close", "reset"])), min_size=1, max_size=4)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mode=st.sampled_from(MODES), clients=CLIENTS)
def test_fuzz_any_actions_of_clients_get_correct_replies(
    server: dict[Mode, echo_async.EchoServer],
    caplog: pytest.LogCaptureFixture,
    mode: Mode,
    clients: list[tuple[list[object], str]],
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    echo = server[mode]
    before = echo.stats
    talking = [FuzzedClient(echo) for _ in clients]
    for step in range(max(len(actions) for actions, _ in clients)):  # each does one thing in its turn
        for client, (actions, _) in zip(talking, clients, strict=True):
            if step < len(actions):
                client.do(actions[step])
    for client, (_, how) in zip(talking, clients, strict=True):
        client.leave(how)
        right = replies(mode, client.sent, LIMIT)
        assert right.startswith(client.received)
        if how == "read" and not client.broken:
            assert client.received == right
    wait_until(lambda: echo.stats.accepted == before.accepted + len(clients) and echo.stats.active == 0)
    assert echo.stats.failed == 0
    assert echo.stats.timeouts_idle + echo.stats.timeouts_message + echo.stats.timeouts_write == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert all(record.getMessage().isprintable() for record in caplog.records)
    caplog.clear()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    backend=st.sampled_from(BACKENDS),
    mode=st.sampled_from(MODES),
    clients=st.lists(ACTIONS, min_size=1, max_size=4),
    begun=st.booleans(),
)
def test_fuzz_shutdown_at_any_time_sends_only_correct_bytes(
    backend: Backend, mode: Mode, clients: list[list[object]], begun: bool
) -> None:
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with ServerThread(
        backend.loop,
        {
            "engine": backend.engine,
            "port": 0,
            "mode": mode,
            "limit_message_size": LIMIT,
            "timeout_graceful_shutdown": 0.05,
            "no_access_log": True,
        },
    ) as echo:
        talking = [FuzzedClient(echo) for _ in clients]
        for client, actions in zip(talking, clients, strict=True):
            for number, action in enumerate(actions):
                if begun and number == len(actions) // 2:
                    echo.close()
                client.do(action)
        echo.close()
        for client in talking:
            client.leave("read")
            assert replies(mode, client.sent, LIMIT).startswith(client.received)
        wait_until(lambda: echo.stats.active == 0 and not echo.sockets)
    assert echo.stats.failed == 0
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_fuzz_servers_still_answer_afterwards(server: dict[Mode, echo_async.EchoServer]) -> None:
    for echo in server.values():
        with connect(echo) as client:
            assert is_echoed(client)
