"""Every option and its default; what makes no sense is refused by name and value."""

from __future__ import annotations

import math
from dataclasses import MISSING, FrozenInstanceError, fields
from typing import Any

import click
import pytest

from echo_async import ConfigError, ServerConfig, serve
from echo_async.cli.server import command
from echo_async.config import CONNECT_TIMEOUT, REPLY_TIMEOUT, ServerOptions

DEFAULTS = {
    "host": "127.0.0.1",
    "port": 5500,
    "uds": None,
    "fd": None,
    "mode": "message",
    "chunk_size": 20,
    "engine": "streams",
    "backlog": 512,
    "limit_connections": None,
    "limit_message_size": 1_048_576,
    "timeout_idle": 600,
    "timeout_message": 60,
    "timeout_write": 30,
    "timeout_graceful_shutdown": 10,
    "ssl_certfile": None,
    "ssl_keyfile": None,
    "ssl_keyfile_password": None,
    "ssl_ca_certs": None,
    "proxy_protocol": "off",
    "proxy_allow_from": "127.0.0.1,::1",
    "no_access_log": False,
}

OF_THE_COMMAND_ALONE = {
    "loop",
    "threaded",
    "workers",
    "metrics_port",
    "metrics_address",
    "log_level",
    "log_format",
    "version",
    "help",
}

TIMEOUTS = ["timeout_idle", "timeout_message", "timeout_write", "timeout_graceful_shutdown"]


def parameters() -> dict[str, click.Parameter]:
    """Every option of the command, by the name of the value that it gives."""
    return {parameter.name: parameter for parameter in command.params if parameter.name is not None}


def test_every_default_is_the_documented_one() -> None:
    assert {field.name: field.default for field in fields(ServerConfig)} == DEFAULTS
    assert (CONNECT_TIMEOUT, REPLY_TIMEOUT) == (10, 10)


def test_serve_takes_exactly_the_options_that_a_server_has() -> None:
    assert set(ServerOptions.__annotations__) == set(DEFAULTS)
    assert not ServerOptions.__total__
    assert all(field.default is not MISSING for field in fields(ServerConfig))


def test_the_command_takes_exactly_the_options_that_a_server_has() -> None:
    assert set(parameters()) - OF_THE_COMMAND_ALONE == set(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_option_of_the_command_has_its_name_and_default(name: str) -> None:
    parameter = parameters()[name]
    assert parameter.opts == ["--" + name.replace("_", "-")]
    given = command.make_context("server", [], **command.context_settings).params
    assert given[name] == DEFAULTS[name]


@pytest.mark.parametrize("name", sorted({*DEFAULTS, *OF_THE_COMMAND_ALONE} - {"version", "help"}))
def test_every_option_can_come_from_the_environment(name: str) -> None:
    context = click.Context(command, **command.context_settings)
    parameter = parameters()[name]
    assert isinstance(parameter, click.Option)
    context.info_name = "server"
    shown = parameter.get_help_record(context)
    assert shown is not None
    assert f"env var: ECHO_ASYNC_{name.upper()}" in " ".join(shown[1].split())


BAD: list[tuple[str, Any]] = [
    *(("mode", value) for value in ["", "Message", "echo", None]),
    *(("engine", value) for value in ["", "asyncio", None]),
    *(("proxy_protocol", value) for value in ["", "on", "V1", None]),
    *(("proxy_allow_from", value) for value in ["", "localhost", "10.0.0.1/8", "127.0.0.1;::1", "::1,", "10.0.0.0/33"]),
    *(("port", value) for value in [-1, 65536, 5500.0, "5500", None]),
    *(("chunk_size", value) for value in [0, -1, 2**30 + 1, 20.0]),
    *(("backlog", value) for value in [0, -1, 2**31]),
    *(("limit_message_size", value) for value in [0, -1, 2**40 + 1, math.inf]),
    *(("limit_connections", value) for value in [0, -1, 2**31]),
    *((name, value) for name in TIMEOUTS for value in [0, -1, -0.0, math.nan, math.inf, -math.inf, "10", None]),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_that_makes_no_sense_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        ServerConfig(**{name: value})
    text = str(refused.value)
    assert text.startswith(f"{name} ")
    assert str(value) in text
    assert ": give " in text
    assert "\n" not in text


def test_an_empty_host_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^host is empty: give "):
        ServerConfig(host="")


@pytest.mark.parametrize("path", ["", "/tmp/a\0b"])
def test_what_is_no_path_is_refused_by_name_and_value(path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ServerConfig(uds=path)
    assert str(refused.value).startswith(f"uds {path!r} ")
    assert ": give " in str(refused.value)


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
        *((name, 0.001) for name in TIMEOUTS),
        *((name, 86_400) for name in TIMEOUTS),
    ],
)
def test_the_ends_of_every_range_are_allowed(name: str, value: Any) -> None:
    assert getattr(ServerConfig(**{name: value}), name) == value


@pytest.mark.parametrize("senders", ["*", "10.0.0.0/8, fd00::/8, 192.0.2.1"])
def test_who_may_send_a_proxy_header_is_a_list_of_networks(senders: str) -> None:
    assert ServerConfig(proxy_protocol="auto", proxy_allow_from=senders).proxy_allow_from == senders


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fd": 3, "uds": "/tmp/echo"}, "fd and uds are two places to listen"),
        ({"ssl_keyfile": "server.key"}, "ssl_keyfile makes no sense without ssl_certfile"),
        ({"ssl_keyfile_password": "secret"}, "ssl_keyfile_password makes no sense without ssl_certfile"),
        ({"ssl_ca_certs": "ca.pem"}, "ssl_ca_certs makes no sense without ssl_certfile"),
        ({"proxy_allow_from": "*"}, "proxy_allow_from makes no sense without proxy_protocol"),
    ],
)
def test_options_that_make_no_sense_together_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ServerConfig(**options)


def test_a_bad_option_is_refused_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match="chunk_size 0"):
        serve(chunk_size=0)


def test_a_bad_option_is_a_value_error_as_well() -> None:
    with pytest.raises(ValueError, match="port 65536 is out of range"):
        ServerConfig(port=65536)


def test_a_config_cannot_be_changed_into_one_that_makes_no_sense() -> None:
    config = ServerConfig()
    with pytest.raises(FrozenInstanceError):
        config.port = -1  # type: ignore[misc]
