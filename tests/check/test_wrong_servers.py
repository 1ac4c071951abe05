"""``echo-async check`` finds each defect of a server or relay by one check, and by no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import wrong_servers as wrong
from support import over_socket

from echo_async.check.checks import run_checks
from echo_async.check.context import Context, Settings
from echo_async.check.datagrams import check_udp
from echo_async.check.opening import check_connect
from echo_async.check.result import Failure, Result
from echo_async.client.endpoint import Endpoint
from echo_async.config import Mode
from echo_async.testing import HostedServer

pytestmark = pytest.mark.usefixtures("no_leaks")

CHECK_TIMEOUT = 3.0  # seconds
SETTINGS = Settings(connections=20, size=70_000, idle=1.0)

DEFECTS = [
    (wrong.greet, "mode", "without a greeting"),
    (wrong.echo_the_proxy_header, "mode", "a PROXY header"),
    (wrong.answer_each_read, "mode", "each read"),
    (wrong.remove_the_newline, "mode", "newline is removed"),
    (wrong.answer_first_packet, "split", "first read"),
    (wrong.answer_last_chunk, "split", "last chunk"),
    (wrong.decode_each_chunk, "split", "decodes"),
    (wrong.decode_each_message, "bytes", "decodes"),
    (wrong.strip_carriage_returns, "bytes", "carriage returns"),
    (wrong.cut_at_64_kib, "bytes", "a limit of the message size"),
    (wrong.answer_all_that_was_read, "joined", "instead of one message"),
    (wrong.lose_what_is_joined, "joined", "loses the others"),
    (wrong.reorder, "joined", "in no order"),
    (wrong.close_at_half_close, "half-close", "closes both directions"),
    (wrong.never_end, "half-close", "does not close"),
    (wrong.stay_open_after_the_reply, "close", "does not close"),
    (wrong.reset_with_input_unread, "close", "unread input"),
    (wrong.never_end_after_incomplete_input, "incomplete", "waits for a newline"),
    (wrong.add_a_newline, "incomplete", "adds to the replies"),
    (wrong.serve_one_at_a_time, "concurrent", "one client at a time"),
    (wrong.mix_up_clients, "concurrent", "one variable or buffer"),
    (wrong.swallow_a_reset, "reset", "a reset ends more"),
    (wrong.wait_for_a_slow_client, "slow", "waits for one client"),
    (wrong.wait_for_a_client_that_does_not_read, "slow", "waits for one client"),
    (wrong.cut_a_client_that_does_not_read, "backpressure", "cut"),
    (wrong.end_an_idle_connection, "idle", "idle timeout"),
    (wrong.describe_the_first_client, "identity", "not all servers"),
]


def find_failures(handler: wrong.Handler) -> list[Result]:
    shared = wrong.Server()
    with HostedServer(handler=over_socket(partial(handler, shared))) as server:
        failed = check(*server.address)
        shared.stopped.set()
    return failed


def check(*address: Any, settings: Settings = SETTINGS, **options: Any) -> list[Result]:
    """Run all checks; return the failed ones."""
    endpoint = Endpoint(*address, timeout=CHECK_TIMEOUT, **options)
    return [each for each in run_checks(endpoint, settings) if each.result == "failed"]


def test_each_defect_is_found_by_its_own_check_only() -> None:
    with ThreadPoolExecutor(len(DEFECTS)) as pool:
        found = list(pool.map(find_failures, [handler for handler, _, _ in DEFECTS]))
    for (handler, name, reason), failed in zip(DEFECTS, found, strict=True):
        assert [each.check for each in failed] == [name], (handler.__name__, failed)
        assert failed[0].seen
        assert reason in (failed[0].reason or "")
        if handler is wrong.strip_carriage_returns:
            assert failed[0].seen.startswith(r'255 instead of 256 bytes, from byte 12 on "\x0e\x0f\x10')


@pytest.mark.parametrize(("mode", "reason"), [("raw", "what each recv gives"), ("message", "not in mode stream")])
def test_another_mode_is_explained_by_what_the_server_does(mode: Mode, reason: str) -> None:
    with HostedServer(mode=mode) as server:
        [failed] = check(*server.address, settings=replace(SETTINGS, mode="stream"))
    assert (failed.check, failed.seen) == ("mode", f"mode {mode}")
    assert reason in (failed.reason or "")


def test_connection_limit_is_found_by_the_check_of_concurrent() -> None:
    """The server ends the handshakes of all others."""
    with HostedServer(tls=True, limit_connections=10) as server:
        [failed] = check(*server.address, ssl=server.client_context, server_hostname="localhost")
    assert failed.check == "concurrent"
    assert re.match(r"\d+ of 20 connections, then: cannot connect to ", failed.seen)
    assert "a limit of connections" in (failed.reason or "")


def drop_every_tenth(number: int, data: bytes) -> bytes:
    return data if number % 10 else b""


def test_dropped_datagrams_are_found_by_the_check_of_udp_only() -> None:
    with HostedServer() as server, wrong.answer_datagrams(server.address, drop_every_tenth):
        [failed] = check(*server.address, settings=replace(SETTINGS, idle=0.1, udp=True))
    assert failed.check == "udp"
    assert re.match(r"20 of 200 lost", failed.seen)


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (lambda number, data: data[:-1] + b"?", "datagrams changed"),
        (lambda number, data: data * (len(data) < 1000), "no datagram of 1,472 bytes, 0 of 200 lost, 0 out of order"),
    ],
)
def test_changed_and_large_datagrams_are_found_by_udp(
    answer: Callable[[int, bytes], bytes], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echo_async.check.datagrams.SIZES", (1472,))  # each that is lost takes a second
    with (
        HostedServer() as server,
        wrong.answer_datagrams(server.address, answer),
        closing(Context(Endpoint(*server.address), Settings())) as context,
    ):
        check_connect(context)
        with pytest.raises(Failure, match=seen):
            check_udp(context)
