"""The configuration of a server: ranges and combinations."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from echo_async import ConfigError, ServerConfig, connect, serve, sync
from echo_async.testing import HostedServer

TIMEOUTS = ["timeout_idle", "timeout_message", "timeout_write", "timeout_graceful_shutdown"]


INVALID: list[tuple[str, Any]] = [
    *(("uds", value) for value in ["", "/tmp/a\0b"]),
    ("host", ""),
    *(("mode", value) for value in ["", "Message", "echo", None]),
    *(("engine", value) for value in ["", "asyncio", None]),
    *(("proxy_protocol", value) for value in ["", "on", "V1", None]),
    *(("proxy_allow_from", value) for value in ["", "localhost", "10.0.0.1/8", "127.0.0.1;::1", "::1,", "10.0.0.0/33"]),
    *(("port", value) for value in [-1, 65536, 5500.0, "5500", None]),
    *(("chunk_size", value) for value in [0, -1, 2**30 + 1, 20.0]),
    *(("backlog", value) for value in [0, -1, 2**31]),
    *(("limit_message_size", value) for value in [0, -1, 2**40 + 1, math.inf]),
    *(("limit_connections", value) for value in [0, -1, 2**31]),
    *(("fault", value) for value in [b"drop", 1, ["drop"]]),
    *(("fault_sequence", value) for value in [[1], 1]),
    *(("fault_seed", value) for value in [-1, 2**63, "1", 1.0]),
    *((name, value) for name in TIMEOUTS for value in [0, -1, -0.0, math.nan, math.inf, -math.inf, "10", None]),
]


def test_invalid_value_is_reported_with_name_and_value() -> None:
    for name, value in INVALID:
        with pytest.raises(ConfigError) as raised:
            ServerConfig(**{name: value})
        text = str(raised.value)
        assert text.startswith(f"invalid {name}: {value!r} (")
        assert re.search(r"\((must be|choose from) .*\)$", text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 0),
        ("port", 65535),
        ("chunk_size", 1),
        ("chunk_size", 2**30),
        ("backlog", 1),
        ("limit_message_size", 1),
        ("limit_connections", 1),
        ("labels", {"a": 1023 * "x"}),
        *((name, 0.001) for name in TIMEOUTS),
        *((name, 86_400) for name in TIMEOUTS),
    ],
)
def test_range_ends_are_valid(name: str, value: Any) -> None:
    assert getattr(ServerConfig(**{name: value}), name) == value


@pytest.mark.parametrize("networks", ["*", "10.0.0.0/8, fd00::/8, 192.0.2.1"])
def test_proxy_allow_from_takes_networks(networks: str) -> None:
    assert ServerConfig(proxy_protocol="auto", proxy_allow_from=networks).proxy_allow_from == networks


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"fd": 3, "uds": "/tmp/echo"}, "fd and uds are mutually exclusive"),
        ({"udp_allow_from": "10.0.0.0/8"}, "udp_allow_from requires udp"),
        ({"udp": True, "udp_allow_from": "10.0.0.1/8"}, r"invalid udp_allow_from: .*\(must be addresses and networks"),
        ({"udp": True, "uds": "echo.sock"}, "udp conflicts with uds"),
        ({"ssl_keyfile": "server.key"}, "ssl_keyfile requires ssl_certfile"),
        ({"ssl_keyfile_password": "secret"}, "ssl_keyfile_password requires ssl_certfile"),
        ({"ssl_ca_certs": "ca.pem"}, "ssl_ca_certs requires ssl_certfile"),
        ({"proxy_allow_from": "*"}, "proxy_allow_from requires proxy_protocol"),
        ({"fault": "drop", "fault_sequence": ["drop"]}, "fault and fault_sequence are mutually exclusive"),
        ({"fault_seed": 1}, "fault_seed requires fault or fault_sequence"),
        ({"fault": "drop", "fd": 3}, "fault and fault_sequence conflict with fd; use host and port, or uds"),
        ({"fault_sequence": [None], "fd": 3}, "fault and fault_sequence conflict with fd"),
    ],
)
def test_invalid_combination_is_reported(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        ServerConfig(**options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"fault": "dely=1"},
            "invalid fault: 'dely=1' (unknown fault kind 'dely'; choose from delay, rate, slice, drop, ",
        ),
        ({"fault": "reset,close"}, "invalid fault: 'reset,close' (reset and close are mutually exclusive)"),
        ({"fault_sequence": ["no-accept"]}, "invalid fault_sequence: ['no-accept'] (no-accept applies to all conn"),
    ],
)
def test_invalid_fault_names_the_part(options: dict[str, Any], error: str) -> None:
    for create in (ServerConfig, serve, sync.serve):
        with pytest.raises(ConfigError, match=re.escape(error)):
            create(**options)


@pytest.mark.parametrize("create", [ServerConfig, serve, sync.serve, HostedServer])
def test_unknown_option_names_the_one_that_was_meant(create: Any) -> None:
    with pytest.raises(TypeError, match="unknown option 'mod'; did you mean 'mode'"):
        create(mod="stream")


@pytest.mark.parametrize("create", [connect, sync.connect])
def test_unknown_client_option_names_the_one_meant(create: Any) -> None:
    with pytest.raises(TypeError, match="unknown option 'tiemout'; did you mean 'timeout'"):
        create(tiemout=1)
    with pytest.raises(TypeError, match="unknown option 'colour'; choose from host, port, uds, timeout, "):
        create(colour=1)


@pytest.mark.parametrize("create", [connect, sync.connect])
@pytest.mark.parametrize(
    ("host", "advice"),
    [(("127.0.0.1", 5500), "as two arguments: *address"), ("localhost:5500", "give 5500 as the port")],
)
def test_address_in_place_of_the_host_is_explained(create: Any, host: Any, advice: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(advice)):
        create(host)


@pytest.mark.parametrize("open_", [serve, connect])
def test_forgotten_await_tells_what_to_write(open_: Any) -> None:
    usage = re.escape(f"write 'async with {open_.__name__}(...)' or 'await {open_.__name__}(...)'")
    with pytest.raises(AttributeError, match=f"'address' .*; {usage}"):
        open_(port=1).address  # noqa: B018
    with pytest.raises(TypeError, match=usage), open_(port=1):
        pass
