"""What the commands share: options, exit codes, and errors as one line on stderr."""

import enum
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import click
from click.core import ParameterSource

from .. import __version__
from ..config import FLAG, Kind, Option
from ..errors import ConfigError, ConnectError, EchoError, StartError, describe_error
from ..stdio import discard_output, print_error, standard_streams

CONTEXT = {
    "auto_envvar_prefix": "ECHO_ASYNC",
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "show_default": True,
}


SERVICE_LINKS = ("tcp://", "udp://", "sctp://")  # with which the variable <SERVICE>_PORT of Kubernetes begins


class ExitCode(enum.IntEnum):
    SUCCESS = 0
    FAILURE = 1  # a reply was lost, late or different; an expectation was not met; output could not be written
    INVALID_OPTION = 2
    UNAVAILABLE = 3  # the server could not start, or the client could not connect
    NOT_EXECUTABLE = 126  # as a shell reports it
    NOT_FOUND = 127  # as a shell reports it
    INTERRUPTED = 130  # as a shell reports a process that SIGINT ended
    OUTPUT_CLOSED = 141  # as a shell reports a process that SIGPIPE ended


class Group(click.Group):
    """A group that tells which commands there are if it is given none, or one that does not exist."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            raise ConfigError(f"missing command (choose from {', '.join(self.list_commands(ctx))})")
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            raise ConfigError(f"invalid command: {args[0]!r} (choose from {', '.join(self.list_commands(ctx))})")
        return super().resolve_command(ctx, args)

    def find_option(self, ctx: click.Context, option: str) -> Iterator[str]:
        """Yield the commands that have ``option``."""
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if isinstance(command, Group):
                yield from (f"{name} {each}" for each in command.find_option(ctx, option))
            elif command is not None and any(option in each.opts for each in command.params):
                yield name


class ConfigOption(click.Option):
    """A click option that is made from an :class:`~echo_async.config.Option`, which parses and checks its value."""

    def __init__(self, names: Sequence[str], definition: Option) -> None:
        self.definition = definition
        self.variable = f"{CONTEXT['auto_envvar_prefix']}_{definition.flag or names[-1]}".upper()
        default, kind, is_flag = definition.default, definition.kind, definition.kind is FLAG
        is_repeatable = kind.split is not None
        super().__init__(
            names,
            type=_click_type(kind),
            is_flag=is_flag,
            multiple=is_repeatable,
            default=bool(default) if is_flag else [default] if is_repeatable and default is not None else default,
            metavar=None if is_flag or kind.choices else kind.metavar,
            show_default=definition.default_text or True,
            envvar=self.variable,
            show_envvar=True,
            help=definition.help,
        )

    def consume_value(self, ctx: click.Context, opts: Any) -> Any:
        """Ignore a variable that Kubernetes has set for a Service, also if the command line overrides it."""
        name, value = self.variable, os.environ.get(self.variable, "")
        if name.endswith("_PORT") and value.startswith(SERVICE_LINKS) and not ctx.resilient_parsing:
            print_error(f"ignoring {name}={value}: set by Kubernetes for a Service (enableServiceLinks)", "warning")
            del os.environ[name]
        return super().consume_value(ctx, opts)

    def value_from_envvar(self, ctx: click.Context) -> Any:
        text, split = self.resolve_envvar_value(ctx), self.definition.kind.split
        return split(text) if text and split is not None else super().value_from_envvar(ctx)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        texts = list(value) if isinstance(value, list | tuple) else [value]
        if not texts or not isinstance(texts[0], str):  # not given, or a flag without a value
            return super().type_cast_value(ctx, value) or self.definition.default
        parsed = self.definition.kind.parse(texts)
        if requirement := self.definition.violation(parsed):
            is_from_environment = ctx.get_parameter_source(self.name or "") is ParameterSource.ENVIRONMENT
            name = self.variable if is_from_environment else self.opts[0]
            raise ConfigError(f"invalid {name}: {texts[0] if len(texts) == 1 else value!r} ({requirement})")
        return parsed


def _click_type(kind: Kind) -> "click.ParamType[Any] | None":  # no generic type before click 8.4
    """Return the type that completes a value and shows the limits in the help text."""
    if kind.choices:
        return click.Choice(kind.choices)
    if kind.limits is not None:
        return click.IntRange(*kind.limits)
    return click.Path() if kind.is_path else None


def refuse_conflicts(values: dict[str, Any], option: str, others: Iterable[str]) -> None:
    for name in others:
        if values[name]:
            raise ConfigError(f"--{option} conflicts with --{name.replace('_', '-')}")


def options(definitions: dict[str, Option]) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for each of ``definitions`` to a command, in their order."""

    def decorate(function: Any) -> Any:
        for name, definition in reversed(definitions.items()):
            flag = "--" + (definition.flag or name).replace("_", "-")
            add_option = click.option(flag, name, cls=ConfigOption, definition=definition)
            function = add_option(function)
        return function

    return decorate


version_option = partial(click.version_option, __version__, prog_name="echo-async")


def run_command(command: click.Command, argv: Sequence[str] | None = None) -> int:
    """Run ``command`` with ``argv`` (default: the arguments of the process) and return its exit code."""
    with standard_streams():
        try:
            return int(command.main(None if argv is None else list(argv), standalone_mode=False) or 0)
        except click.exceptions.Exit as stop:
            return stop.exit_code
        except click.Abort:
            return ExitCode.INTERRUPTED
        except SystemExit:  # raised by click if the reader of the help text has closed the pipe
            discard_output(sys.stdout)
            return ExitCode.SUCCESS
        except (click.ClickException, EchoError, OSError) as error:
            return _report(error)
        finally:
            if argv is None:
                gc.freeze()  # excludes all objects from the garbage collection at exit, which takes 10 ms


def _find_option(error: click.NoSuchOption) -> str:
    """Return the other commands that have the option, in words; else ``""``."""
    root = error.ctx.find_root() if error.ctx is not None else None
    if root is None or not isinstance(root.command, Group):
        return ""
    return ", ".join(f"echo-async {name}" for name in root.command.find_option(root, error.option_name))


def _report(error: click.ClickException | EchoError | OSError) -> ExitCode:
    """Print ``error`` as one line; return the exit code for it."""
    match error:
        case click.BadParameter() if error.param is not None:
            text, code = f"invalid {error.param.opts[0]}: {error.message}", ExitCode.INVALID_OPTION
        case click.NoSuchOption() if places := _find_option(error):
            text, code = f"invalid option: {error.option_name} (an option of {places})", ExitCode.INVALID_OPTION
        case click.ClickException():
            text, code = " ".join(error.format_message().split()), ExitCode.INVALID_OPTION
        case ConfigError():
            text, code = str(error), ExitCode.INVALID_OPTION
        case StartError() | ConnectError():
            text, code = str(error), ExitCode.UNAVAILABLE
        case EchoError():
            text, code = str(error), ExitCode.FAILURE
        case _:  # a full disk
            discard_output(sys.stdout)
            text, code = f"cannot write to stdout: {describe_error(error)}", ExitCode.FAILURE
    print_error(text)
    return code
