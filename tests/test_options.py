"""The options: one definition for the library, the commands and the tables in the documentation."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import click
import pytest

import echo_async
from echo_async import ConfigError, sync
from echo_async.cli import client, server
from echo_async.config import ClientConfig, ClientOptions, Option, ServerConfig, ServerOptions, options_of

DOCS = Path(__file__).parent.parent / "docs"

COMMAND_OPTIONS = [
    *((server.command, name, option) for name, option in server.OPTIONS.items()),
    *((client.command, name, option) for name, option in client.OPTIONS.items()),
]
each_command_option = pytest.mark.parametrize(
    ("command", "name", "definition"), COMMAND_OPTIONS, ids=lambda value: value if isinstance(value, str) else None
)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The script that ``make docs`` runs."""
    spec = importlib.util.spec_from_file_location("generator", DOCS / "options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def parameter(command: click.Command, name: str) -> click.Option:
    [found] = [each for each in command.params if each.name == name]
    assert isinstance(found, click.Option)
    return found


@each_command_option
def test_command_line_option_matches_its_definition(command: click.Command, name: str, definition: Option) -> None:
    assert parameter(command, name).opts == ["--" + (definition.flag or name).replace("_", "-")]
    values = command.make_context("command", [], **command.context_settings).params
    default = () if definition.is_repeatable and definition.default is None else definition.default
    assert values[name] == (bool(default) if definition.type == "flag" else default)


@each_command_option
def test_command_help_shows_environment_variable(command: click.Command, name: str, definition: Option) -> None:
    context = click.Context(command, **command.context_settings)
    record = parameter(command, name).get_help_record(context)
    assert record is not None
    text = " ".join(record[1].split())
    assert definition.help in text
    assert f"env var: ECHO_ASYNC_{(definition.flag or name).upper()}" in text


@pytest.mark.parametrize(("command", "options"), [(server.command, server.OPTIONS), (client.command, client.OPTIONS)])
def test_command_has_no_other_options(command: click.Command, options: dict[str, Option]) -> None:
    names = [each.name for each in command.params if isinstance(each, click.Option)]
    assert names == [*options, "version"]


@pytest.mark.parametrize("name", ["port", "timeout", "mode"])
def test_default_is_valid(name: str) -> None:
    option = {**client.OPTIONS, **server.OPTIONS}[name]
    option.validate(name, option.default)
    with pytest.raises(ConfigError, match=f"^invalid {name}: 'x' \\("):
        option.validate(name, "x")


# The documentation


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_docs_tables_are_up_to_date(path: Path, generator: ModuleType) -> None:
    """Run ``make docs`` if this fails."""
    assert generator.update(path.read_text()) == path.read_text()


@pytest.mark.parametrize("name", ["server", "client"])
def test_docs_have_a_table_per_command(name: str) -> None:
    assert f"<!-- options: {name} -->" in (DOCS / f"{name}.md").read_text()
