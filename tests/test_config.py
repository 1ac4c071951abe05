"""The configuration of a server: ranges and combinations."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from echo_async import ConfigError, ServerConfig, connect, serve, sync
from echo_async.config import ClientConfig
from echo_async.testing import HostedServer

TIMEOUTS = ["timeout_idle", "timeout_message", "timeout_write", "timeout_graceful_shutdown"]


INVALID: list[tuple[str, Any]] = [
    *(("uds", value) for value in ["", "/tmp/a\0b"]),
    ("host", ""),
    *(("mode", value) for value in ["", "Message", "echo", None]),
    *(("engine", value) for value in ["", "asyncio", None]),
    *(("proxy_protocol", value) for value in ["", "on", "V1", None]),
    *(("proxy_allow_from", value) for value in ["", "localhost", "10.0.0.1/8", "127.0.0.1;::1", "::1,", "10.0.0.0/33"]),
    ("udp_allow_from", "10.0.0.1/8"),
    *(("port", value) for value in [-1, 65536, 5500.0, "5500", None]),
    *(("chunk_size", value) for value in [0, -1, 2**30 + 1, 20.0]),
    *(("backlog", value) for value in [0, -1, 2**31]),
    *(("limit_message_size", value) for value in [0, -1, 2**40 + 1, math.inf]),
    *(("limit_connections", value) for value in [0, -1, 2**31]),
    *(("fault", value) for value in [b"drop", 1, ["drop"]]),
    *(("fault_sequence", value) for value in [[1], 1]),
    *(("fault_seed", value) for value in [-1, 2**63, "1", 1.0]),
    *(("labels", {key: "x"}) for key in ["", "1a", "a b", "\udcf1", "version", "engine", "__name__"]),
    *(("labels", value) for value in [{"a": 1}, ["a"], "a", {"a": 1024 * "x"}, {"a": "\udcf1"}, ["a=1", "a=2"]]),
    *(("ssl_alpn", value) for value in ["", ",", "a,,b", 256 * "x"]),
    *((name, value) for name in TIMEOUTS for value in [0, -1, -0.0, math.nan, math.inf, -math.inf, "10", None]),
]


def test_invalid_value_is_reported_with_name_and_value() -> None:
    for name, value in INVALID:
        with pytest.raises(ConfigError) as raised:
            ServerConfig(**{name: value})
        text = str(raised.value)
        assert text.startswith(f"invalid {name}: {value!r} (")
        assert re.search(r"\((must be|choose from) .*\)$", text)


VALID: list[tuple[str, Any]] = [
    *(("port", value) for value in (0, 65535)),
    *(("chunk_size", value) for value in (1, 2**30)),
    *((name, 1) for name in ("backlog", "limit_message_size", "limit_connections")),
    ("labels", {"a": 1023 * "x"}),
    *((name, value) for name in TIMEOUTS for value in (0.001, 86_400)),
]


def test_range_ends_are_valid() -> None:
    for name, value in VALID:
        assert getattr(ServerConfig(**{name: value}), name) == value
    for networks in ("*", "10.0.0.0/8, fd00::/8, 192.0.2.1"):
        ServerConfig(proxy_protocol="auto", proxy_allow_from=networks)


@pytest.mark.parametrize("config", [ServerConfig, ClientConfig])
def test_configuration_has_the_text_of_a_path(config: type[ServerConfig]) -> None:
    assert config(uds=Path("dir/\udcf1.sock")).uds == "dir/\udcf1.sock"
    with pytest.raises(ConfigError, match="invalid uds: 1 "):
        config(uds=1)  # type: ignore[arg-type]


CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"fd": 3, "uds": "/tmp/echo"}, "fd and uds are mutually exclusive"),
    ({"udp_allow_from": "10.0.0.0/8"}, "udp_allow_from requires udp"),
    ({"udp": True, "uds": "echo.sock"}, "udp conflicts with uds"),
    ({"ssl_keyfile": "server.key"}, "ssl_keyfile requires ssl_certfile"),
    ({"ssl_keyfile_password": "secret"}, "ssl_keyfile_password requires ssl_certfile"),
    ({"ssl_ca_certs": "ca.pem"}, "ssl_ca_certs requires ssl_certfile"),
    ({"ssl_alpn": "echo"}, "ssl_alpn requires ssl_certfile"),
    ({"proxy_allow_from": "*"}, "proxy_allow_from requires proxy_protocol"),
    ({"fault": "drop", "fault_sequence": ["drop"]}, "fault and fault_sequence are mutually exclusive"),
    ({"fault_seed": 1}, "fault_seed requires fault or fault_sequence"),
    ({"fault": "drop", "fd": 3}, "fault and fault_sequence conflict with fd; use host and port, or uds"),
    ({"fault_sequence": [None], "fd": 3}, "fault and fault_sequence conflict with fd"),
    ({"fault": "dely=1"}, "invalid fault: 'dely=1' (unknown fault kind 'dely'; choose from delay, rate, slice, drop, "),
    ({"fault_sequence": ["no-accept"]}, "invalid fault_sequence: ['no-accept'] (no-accept applies to all conn"),
]


def test_invalid_combination_is_reported() -> None:
    for options, error in CONFLICTS:
        with pytest.raises(ConfigError, match=re.escape(error)):
            ServerConfig(**options)
    for create in (serve, sync.serve):
        with pytest.raises(ConfigError, match=re.escape(error)):
            create(**options)


def test_unknown_option_names_the_one_that_was_meant() -> None:
    creators: list[Any] = [ServerConfig, serve, sync.serve, HostedServer]
    for create in creators:
        with pytest.raises(TypeError, match="unknown option 'mod'; did you mean 'mode'"):
            create(mod="stream")


@pytest.mark.parametrize("create", [connect, sync.connect])
def test_wrong_client_arguments_are_explained(create: Any) -> None:
    with pytest.raises(TypeError, match="unknown option 'tiemout'; did you mean 'timeout'"):
        create(tiemout=1)
    with pytest.raises(TypeError, match="unknown option 'colour'; choose from host, port, uds, timeout, "):
        create(colour=1)
    for host, advice in ((("127.0.0.1", 5500), "as two arguments: *address"), ("localhost:5500", "give 5500 as the")):
        with pytest.raises(ConfigError, match=re.escape(advice)):
            create(host)


@pytest.mark.parametrize("open_", [serve, connect])
def test_forgotten_await_tells_what_to_write(open_: Any) -> None:
    usage = re.escape(f"write 'async with {open_.__name__}(...)' or 'await {open_.__name__}(...)'")
    with pytest.raises(AttributeError, match=f"'address' .*; {usage}"):
        open_(port=1).address  # noqa: B018
    with pytest.raises(TypeError, match=usage), open_(port=1):
        pass
