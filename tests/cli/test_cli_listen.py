"""``--listen``: texts to configurations, and what is wrong with them in one line."""

from __future__ import annotations

from typing import Any

import pytest
from support import Cli

from echo_async import ConfigError
from echo_async.cli.listen import NAMES, parse_listeners
from echo_async.config import ServerConfig, options_of

DEFAULTS = {name: option.default for name, option in options_of(ServerConfig).items()}


def parse(*specs: str, inherited: dict[int, str] | None = None, **others: Any) -> list[ServerConfig]:
    """Parse ``specs`` beside ``others``, the other options."""
    return [each.config for each in parse_listeners("--listen", specs, {**DEFAULTS, **others}, inherited or {})]


SPECS: list[tuple[str, dict[str, Any]]] = [
    ("5500", {"port": 5500}),
    ("127.0.0.1:0", {"port": 0}),
    ("localhost:80", {"host": "localhost", "port": 80}),
    ("[::]:5501", {"host": "::", "port": 5501}),
    ("[fe80::1%eth0]:0", {"host": "fe80::1%eth0", "port": 0}),
    ("unix:run/echo.sock", {"uds": "run/echo.sock"}),
    ("unix:5500", {"uds": "5500"}),
    ("fd:7", {"fd": 7}),
    ("1,mode=raw", {"port": 1, "mode": "raw"}),
    (
        "1,proxy-protocol=v1,proxy-allow-from=10.0.0.0/8,proxy-allow-from=::1",
        {"port": 1, "proxy_protocol": "v1", "proxy_allow_from": "10.0.0.0/8,::1"},
    ),
    ("1,fault=delay=0.1,fault=slice=1,fault-seed=7", {"port": 1, "fault": "delay=0.1,slice=1", "fault_seed": 7}),
    ("1,fault-sequence=reset;none", {"port": 1, "fault_sequence": "reset;none"}),
    ("1,chunk-size=64,limit-message-size=9", {"port": 1, "chunk_size": 64, "limit_message_size": 9}),
    ("1,label=zone=eu-1,label=tier=a=b", {"port": 1, "labels": {"zone": "eu-1", "tier": "a=b"}}),
    (
        "1,udp,udp-allow-from=10.0.0.0/8,udp-allow-from=::1",
        {"port": 1, "udp": True, "udp_allow_from": "10.0.0.0/8,::1"},
    ),
    ("1,no-access-log", {"port": 1, "no_access_log": True}),
    ("1,no-access-log=false", {"port": 1}),
]


def test_listen_spec_is_a_configuration() -> None:
    for spec, options in SPECS:
        assert parse(spec) == [ServerConfig(**options)]


def test_listen_option_not_given_comes_from_the_others() -> None:
    others: dict[str, Any] = {
        "mode": "raw",
        "engine": "threads",
        "backlog": 5,
        "timeout_idle": 1.0,
        "limit_connections": 9,
        "labels": {"zone": "eu-1", "tier": "web"},
    }
    assert parse("1,timeout-idle=2,label=tier=db,label=role=main", "2", **others) == [
        ServerConfig(
            port=1, **{**others, "timeout_idle": 2.0, "labels": {"zone": "eu-1", "tier": "db", "role": "main"}}
        ),
        ServerConfig(port=2, **others),
    ]


def test_listen_ignores_options_that_it_cannot_use() -> None:
    """As given for another listener, which has what they require, or asks for them."""
    files: dict[str, Any] = {"ssl_certfile": "server.pem", "ssl_keyfile": "server.key", "ssl_ca_certs": "ca.pem"}
    assert parse("1", "2,tls", "3,tls=false", **files) == [
        ServerConfig(port=1),
        ServerConfig(port=2, **files),
        ServerConfig(port=3),
    ]
    assert parse("1", "2,proxy-protocol=auto", proxy_allow_from="*") == [
        ServerConfig(port=1),
        ServerConfig(port=2, proxy_protocol="auto", proxy_allow_from="*"),
    ]
    assert parse("1", "2,fault=drop", fault_seed=5) == [
        ServerConfig(port=1),
        ServerConfig(port=2, fault="drop", fault_seed=5),
    ]
    assert parse("1,fault=drop", "2", fault_sequence="reset") == [
        ServerConfig(port=1, fault="drop"),
        ServerConfig(port=2, fault_sequence="reset"),
    ]
    assert parse("unix:a", "1", "2,udp=false", udp=True, udp_allow_from="*") == [
        ServerConfig(uds="a"),
        ServerConfig(port=1, udp=True, udp_allow_from="*"),
        ServerConfig(port=2),
    ]
    assert parse("1,proxy-protocol=off", proxy_protocol="v1", proxy_allow_from="*") == [ServerConfig(port=1)]


def test_listen_name_has_all_sockets_of_that_name() -> None:
    inherited = {3: "plain", 4: "secure", 5: "plain"}
    specs = ("fd:plain", "fd:secure,mode=raw")
    plain, secure = parse_listeners("--listen", specs, DEFAULTS, inherited)
    assert plain == (ServerConfig(fd=3), [3, 5])
    assert secure == (ServerConfig(fd=4, mode="raw"), [4])
    for specs in [("fd:plain", "fd:5"), ("fd:3", "fd:plain")]:
        with pytest.raises(ConfigError, match="another listener has this address"):
            parse(*specs, inherited=inherited)


ADDRESS_FORMS = "the address must be PORT, HOST:PORT, [ADDRESS]:PORT, unix:PATH, fd:NAME or fd:NUMBER"
OPTIONS = ", ".join(NAMES)
INVALID = [
    ("5500,colour=red", f"unknown option 'colour'; choose from {OPTIONS}"),
    ("5500,engine=threads", f"unknown option 'engine'; choose from {OPTIONS}"),
    ("5500,fault=delay=0.1,slice=1", f"unknown option 'slice'; choose from {OPTIONS}"),
    *((address, ADDRESS_FORMS) for address in ("", "http", "-1", ":5500", "::1:5500", "[::1]", "unix:", "fd:", "1 ")),
    ("65536", "port: must be an integer from 0 to 65535"),
    ("5500,mode=echo", "mode: choose from "),
    ("5500,chunk-size=x", "chunk-size: must be an integer from 1 to 1073741824"),
    ("5500,no-access-log=maybe", "no-access-log: must be a boolean"),
    ("5500,proxy-allow-from=*", "proxy_allow_from requires proxy_protocol"),
    ("5500,fault-seed=1", "fault_seed requires fault or fault_sequence"),
    ("5500,fault=drop,fault-sequence=drop", "fault and fault_sequence are mutually exclusive"),
    ("5500,mode=raw,mode=raw", "mode is given twice"),
    ("5500,label=zone", "label: must be KEY=VALUE"),
    ("5500,tls", "tls requires --ssl-certfile"),
    ("5500,tls=perhaps", "tls: must be a boolean"),
    ("fd:9,fault=drop", "fault and fault_sequence conflict with fd; "),
    ("fd:web", "no inherited socket has this name; LISTEN_FDNAMES has none"),
]


def test_invalid_listen_spec_is_one_line_with_the_reason(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, reason in INVALID:
        error = cli.error("server --listen 0 --listen", spec, code=2)
        assert error.startswith(f"error: invalid --listen: {spec!r} ({reason}")
    monkeypatch.setenv("ECHO_ASYNC_LISTEN", "0 5500,mode=x")
    assert cli.error("server", code=2).startswith("error: invalid ECHO_ASYNC_LISTEN: '5500,mode=x' (mode: choose from ")


def test_two_listeners_on_one_address_are_an_error(cli: Cli) -> None:
    for first, second in (
        *(("5500", "127.0.0.1:5500,mode=raw"), ("unix:a", "unix:a"), ("fd:7", "fd:7"), ("[::]:1", "[::]:1")),
    ):
        error = cli.error(f"server --listen {first} --listen 0 --listen {second}", code=2)
        assert error == f"error: invalid --listen: {second!r} (another listener has this address)\n"


def test_listen_with_another_address_is_an_error(cli: Cli) -> None:
    for name, value in (("--host", "::1"), ("--port", "0"), ("--uds", "a"), ("--fd", "9")):
        error = cli.error(f"server --listen 0 {name} {value}", code=2)
        assert error == f"error: --listen and {name} are mutually exclusive\n"
