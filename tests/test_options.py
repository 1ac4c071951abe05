"""The options: one definition for the library, the commands and the documentation."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest

import echo_async
from echo_async import ConfigError, sync
from echo_async.cli import check, client, server
from echo_async.config import FLAG, ClientConfig, ClientOptions, Option, ServerConfig, ServerOptions, options_of

DOCS = Path(__file__).parent.parent / "docs"

# The library


def test_server_options_match_config() -> None:
    """The same names and types, in the same order."""
    types = get_type_hints(ServerConfig)
    assert list(get_type_hints(ServerOptions).items()) == [
        (each.name, types[each.name]) for each in fields(ServerConfig)
    ]
    assert not ServerOptions.__total__


def test_client_options_match_config() -> None:
    assert set(ClientOptions.__annotations__) == set(options_of(ClientConfig)) - {"host", "port"}
    assert not ClientOptions.__total__


@pytest.mark.parametrize("connect", [echo_async.connect, sync.connect])
def test_connect_defaults_match_config(connect: Any) -> None:
    host, port, options = inspect.signature(connect).parameters.values()
    defaults = options_of(ClientConfig)
    assert (host.default, port.default) == (defaults["host"].default, defaults["port"].default)
    assert options.kind is options.VAR_KEYWORD


# The commands


@pytest.mark.parametrize("module", [server, client, check], ids=lambda module: module.__name__)
def test_command_line_options_match_their_definitions(module: Any) -> None:
    options = [each for each in module.command.params if isinstance(each, click.Option)]
    assert [each.name for each in options] == [*module.OPTIONS, "version"]
    context = module.command.make_context("command", [], **module.command.context_settings)
    for option, (name, definition) in zip(options, module.OPTIONS.items(), strict=False):
        flag = definition.flag or name
        assert option.opts == ["--" + flag.replace("_", "-")]
        assert context.params[name] == definition.default
        record = option.get_help_record(context)
        assert record is not None
        text = " ".join(record[1].split())
        assert definition.help in text
        assert f"env var: ECHO_ASYNC_{flag.upper()}" in text


def test_default_is_valid() -> None:
    for name in ("port", "timeout", "mode"):
        option = {**client.OPTIONS, **server.OPTIONS}[name]
        option.validate(name, option.default)
        with pytest.raises(ConfigError, match=f"^invalid {name}: 'x' \\("):
            option.validate(name, "x")


# The documentation


def test_docs_server_options_have_their_defaults() -> None:
    section = (DOCS / "server.md").read_text().partition("\n## Options\n")[2].partition("\n## ")[0]
    listed = re.findall(r"`(--[\w-]+)`(?:\]\([^)]*\))?(?: \(([^)]*)\))?", section.partition("|---|")[2])
    expected = {f"--{(each.flag or name).replace('_', '-')}": default(each) for name, each in server.OPTIONS.items()}
    assert {flag: default if expected[flag] else "" for flag, default in listed} == expected
    assert len(listed) == len(expected)


def default(option: Option) -> str:
    has_default = option.kind is not FLAG and option.default is not None
    number_or_text = f"{option.default:g}" if isinstance(option.default, float) else option.default
    return f"`{number_or_text}`" if has_default else option.default_text
