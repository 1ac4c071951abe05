"""Commands that cannot run: one line on stderr, and exit code 2 or 3. ``tests/test_config.py`` has the ranges."""

from __future__ import annotations

import os
import re
import sys

import pytest
from support import Cli

INVALID = [
    # Subcommands
    ("", "missing command (choose from server, client, check, run, bench)"),
    ("sever", "invalid command: 'sever' (choose from server, client, check, run, bench)"),
    ("bench", "missing command (choose from compare, load)"),
    ("bench laod", "invalid command: 'laod' (choose from compare, load)"),
    ("--missing", "No such option"),
    ("run", "missing COMMAND (usage: echo-async run "),
    ("run --port 0 --", "missing COMMAND (usage: echo-async run "),
    # Options, and arguments. What click adds depends on its version.
    ("client --missing", "No such option"),
    ("server --prot 80", "No such option"),
    ("run --missing -- true", "No such option"),
    ("client --mode stream", "invalid option: --mode (an option of echo-async server, echo-async check, "),
    ("server --rounds 3", "invalid option: --rounds (an option of echo-async bench compare)"),
    ("server 5500", "Got unexpected extra argument (5500)"),
    ("bench load surplus", "Got unexpected extra argument (surplus)"),
    # Values: one of each type
    ("server --port=abc", "invalid --port: 'abc' (must be an integer from 0 to 65535)"),
    ("server --mode=echo", "invalid --mode: 'echo' (choose from "),
    ("server --loop=custom:", "invalid --loop: 'custom:' (choose from auto, asyncio, uvloop, MODULE:FACTORY)"),
    ("server --workers=0", "invalid --workers: '0' (must be an integer from 1 "),
    ("server --limit-message-size=1M", "invalid --limit-message-size: '1M' ("),
    ("server --timeout-idle=nan", "invalid --timeout-idle: 'nan' (must be a number of seconds greater than 0)"),
    ("server --log-level=loud", "invalid --log-level: 'loud' (choose from "),
    ("server --host=", "invalid --host: '' (must be a host name or an address)"),
    ("server --uds=", "invalid --uds: '' (must be the path of a Unix socket)"),
    ("server --fault=delay=0.1,rate=fast", "invalid --fault: 'delay=0.1,rate=fast' (rate requires "),
    ("server --fault-sequence=reset;no-accept", "invalid --fault-sequence: 'reset;no-accept' (no-accept applies to "),
    ("server --fault-seed=x", "invalid --fault-seed: 'x' ("),
    ("run --port x -- true", "invalid --port: 'x' (must be an integer from 0 to 65535)"),
    ("client --port=65536", "invalid --port: '65536' (must be an integer from 1 to 65535)"),
    ("client --port=", "invalid --port: '' (must be an integer from 1 to 65535)"),
    ("client --retry=-1", "invalid --retry: '-1' (must be a number of seconds, 0 or greater)"),
    ("client --count=-1", "invalid --count: '-1' (must be an integer from 0 to 2147483647)"),
    ("client --ssl-ca-certs=/nonexistent", "cannot load ssl_ca_certs /nonexistent: no such file or directory; "),
    ("client --ssl-certfile=/nonexistent", "cannot load ssl_certfile /nonexistent: no such file or directory; "),
    (
        "client --udp --quiet --size 65508",
        "cannot send 65508 bytes to 127.0.0.1:5500: message too long; a datagram has",
    ),
    ("client --udp --size 65528", "invalid --size: '65528' (must be an integer from 0 to 65527)"),
    ("check --mode x", "invalid --mode: 'x' (choose from auto, message, stream, raw, identify)"),
    ("check --connections 1", "invalid --connections: '1' (must be an integer from 2 to 10000)"),
    ("check --size 0", "invalid --size: '0' (must be an integer from 1 to 1073741824)"),
    ("bench load --size 1GB", "invalid --size: '1GB' (must be an integer from 1 to 67108864)"),
    ("bench load --rate nan", "invalid --rate: 'nan' (must be a number of messages per second greater than 0)"),
    ("bench load --rate 0", "invalid --rate: '0' (must be a number of messages per second greater than 0)"),
    ("bench load --processes 11", "invalid --processes: 11 (must be at most the number of connections, 10)"),
    ("bench load --expect p99<5", "invalid --expect: 'p99<5' (must be "),
    ("bench load --ssl-ca-certs /nonexistent", "cannot load ssl_ca_certs /nonexistent: no such file or directory; "),
    ("bench load --udp --size 65508", "invalid --size: 65508 (must be at most 65507 with --udp)"),
    ("bench compare --engines fibers", "invalid --engines: 'fibers' (choose from streams, protocol, threads)"),
    ("bench compare --loops asyncio,", "invalid --loops: 'asyncio,' (choose from "),
    ("bench compare --loops :new", "invalid --loops: ':new' (choose from "),
    ("bench compare --sizes 1,x", "invalid --sizes: '1,x' (must be an integer from 1 to 67108864)"),
    ("bench compare --plot picture.txt", "invalid --plot: 'picture.txt' (must end in .svg, .png or .pdf)"),
    ("bench compare --plot /nonexistent/a.svg", "invalid --plot: '/nonexistent/a.svg' (must be a file in an existing"),
    ("bench compare --disturb waves", "invalid --disturb: 'waves' (must be flood, or idle=N with N from 1 to "),
    ("bench compare --disturb idle=0", "invalid --disturb: 'idle=0' (must be flood, or idle=N with N from 1 to "),
    ("bench compare --disturb idle=3000000000", "invalid --disturb: 'idle=3000000000' (must be flood, or idle=N "),
    # What conflicts, and what requires another option
    ("server --threaded --engine protocol", "--threaded conflicts with --engine protocol"),
    ("server --threaded --loop uvloop", "--loop uvloop conflicts with --engine threads"),
    ("server --engine threads --loop uvloop:new", "--loop uvloop:new conflicts with --engine threads"),
    ("client --ssl-keyfile=/nonexistent", "ssl_keyfile requires ssl_certfile"),
    ("client --count=2 a b", "--count requires exactly one MESSAGE of one line"),
    ("client --count=2 -", "--count requires exactly one MESSAGE of one line"),
    ("client --interval=2", "--interval requires --count"),
    ("client --size=10", "--size requires --udp"),
    ("client --udp hola", "--udp conflicts with MESSAGE"),
    ("client --udp -", "--udp conflicts with MESSAGE"),
    ("check --proxy-source 192.0.2.1:1", "proxy_source requires send_proxy"),
    ("bench load --mode message --pipeline 2", "--pipeline 2 requires --mode stream"),
    ("bench load --udp --rate 1 --pipeline 2", "--udp --rate conflicts with --pipeline"),
    ("bench compare --disturb flood --mode message", "--disturb requires --mode stream"),
]


def test_invalid_command_line_exits_with_2(cli: Cli) -> None:
    for line, reason in INVALID:
        assert cli.error(line, code=2).startswith(f"error: {reason}")


def test_udp_conflicts_with_what_needs_a_connection(cli: Cli) -> None:
    for command, options in (
        ("client", "--ssl --ssl-no-verify --server-hostname=x --identify --retry=1 --uds=x --send-proxy=v1"),
        ("bench load", "--ssl --server-hostname=x --uds=x --mode=stream"),
        ("check", "--uds=x"),
    ):
        for option in options.split():
            name = option.partition("=")[0]
            assert cli.error(f"{command} --udp {option}", code=2) == f"error: --udp conflicts with {name}\n"


def test_invalid_variable_is_reported_by_its_name(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, name, value in (
        ("server", "PORT", "65536"),
        ("server", "MODE", "echo"),
        ("server", "TIMEOUT_IDLE", "-1"),
        ("server", "NO_ACCESS_LOG", "perhaps"),
        ("bench load", "RATE", "x"),
        ("bench compare", "ROUNDS", "0"),
    ):
        with monkeypatch.context() as environment:
            environment.setenv(f"ECHO_ASYNC_{name}", value)
            assert cli.error(command, code=2).startswith(f"error: invalid ECHO_ASYNC_{name}: {value!r} (")


def test_line_without_stderr_is_not_printed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert cli("server 5500") == (2, "", "")


def test_address_that_cannot_be_used_exits_with_3(cli: Cli, closed_port: int, closed_udp_port: int) -> None:
    refused = "connection refused; is the server running?\n"
    for line, reason in (
        (f"server --port {closed_port}", f"listen on 127.0.0.1:{closed_port}: address already in use"),
        ("server --host no-such-host.invalid", "listen on host 'no-such-host.invalid': "),
        ("server --host " + os.fsdecode(b"\xff\xfe"), r"listen on host '\udcff\udcfe': not a host name"),
        (f"client --port {closed_port} hola", f"connect to 127.0.0.1:{closed_port}: {refused}"),
        ("client --udp --host \udcff", r"connect to \udcff:5500: not a host name; check the host name"),
        (f"bench load --port {closed_port}", f"connect to 127.0.0.1:{closed_port}: {refused}"),
        (f"bench load --udp --port {closed_udp_port}", f"connect to 127.0.0.1:{closed_udp_port}: {refused}"),
        ("bench load --uds /nonexistent", "connect to /nonexistent: no such file or directory"),
        ("bench load --host no.invalid", "connect to no.invalid:5500: "),
    ):
        assert cli.error(line, code=3).startswith(f"error: cannot {reason}")


@pytest.mark.parametrize(
    ("missing", "line", "extra"),
    [
        ("uvloop", "server --port 0 --loop uvloop", "uvloop"),
        ("numpy", "bench load", "bench"),
        ("rich", "bench load", "bench"),
        ("matplotlib", "bench compare --plot picture.svg", "bench"),
    ],
)
def test_package_not_installed_exits_with_3(
    missing: str, line: str, extra: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert re.match(f"error: .*{missing}.*pip install 'echo-async\\[{extra}\\]'", cli.error(line, code=3))


def test_loop_that_cannot_be_used_exits_with_3(cli: Cli) -> None:
    for line, reason in (
        ("server --workers 2 --loop missing:new", "missing:new: No module named 'missing'"),
        ("run --loop os:getcwd -- true", "os:getcwd: it returned "),
        ("bench compare --loops os:getcwd", "os:getcwd: it returned "),
    ):
        assert cli.error(line, code=3).startswith(f"error: cannot use --loop {reason}")


def test_child_process_that_cannot_start_exits_with_3(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    error = cli.error("server --port 0 --workers 2", code=3)
    assert error == "error: cannot start /nonexistent/python: no such file or directory\n"
