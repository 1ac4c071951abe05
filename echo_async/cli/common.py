"""What the commands share: options, exit codes, and errors as one line on stderr."""

import contextlib
import enum
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
from click.core import ParameterSource

from .. import __version__
from ..config import MAX_INT, Option
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


class ConfigOption(click.Option):
    """A click option that is made from an :class:`~echo_async.config.Option`, which validates its value."""

    def __init__(self, names: Sequence[str], definition: Option) -> None:
        self.definition = definition
        default, is_flag, is_repeatable = definition.default, definition.type == "flag", definition.is_repeatable
        super().__init__(
            names,
            type=_click_type(definition),
            is_flag=is_flag,
            multiple=is_repeatable,
            default=bool(default) if is_flag else [default] if is_repeatable and default is not None else default,
            metavar=None if is_flag or definition.choices else definition.type.upper(),
            show_default=definition.default_text or True,
            envvar=f"{CONTEXT['auto_envvar_prefix']}_{definition.flag}".upper() if definition.flag else None,
            show_envvar=True,
            help=definition.help,
        )

    def consume_value(self, ctx: click.Context, opts: Any) -> Any:
        """Ignore a variable that Kubernetes has set for a Service, also if the command line overrides it."""
        name = self._variable(ctx)
        value = os.environ.get(name, "")
        if self.definition.type == "integer" and value.startswith(SERVICE_LINKS) and not ctx.resilient_parsing:
            print_error(f"ignoring {name}={value}: set by Kubernetes for a Service (enableServiceLinks)", "warning")
            del os.environ[name]
        return super().consume_value(ctx, opts)

    def _variable(self, ctx: click.Context) -> str:
        return f"{ctx.auto_envvar_prefix}_{self.definition.flag or self.name}".upper()

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """Commas or spaces separate several values; spaces alone where a value can contain commas."""
        text = self.resolve_envvar_value(ctx)
        if not text or not self.multiple:
            return super().value_from_envvar(ctx)
        return (text if self.definition.type == "spec" else text.replace(",", " ")).split()

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        converted = value
        with contextlib.suppress(click.BadParameter):
            converted = super().type_cast_value(ctx, value)
        if self.multiple and len(converted) == 1:
            (converted,) = (value,) = converted
        if requirement := self.definition.violation(converted):
            is_from_environment = ctx.get_parameter_source(self.name or "") is ParameterSource.ENVIRONMENT
            name = self._variable(ctx) if is_from_environment else self.opts[0]
            raise ConfigError(f"invalid {name}: {value!r} ({requirement})")
        return converted


def _click_type(definition: Option) -> "click.ParamType[Any]":  # no generic type before click 8.4
    match definition.type:
        case "choice":
            return click.Choice(definition.choices)
        case "integer":
            return click.IntRange(definition.low, None if definition.high == MAX_INT else definition.high)
        case "path" | "file":
            return click.Path()
        case "seconds":
            return click.FLOAT
        case "flag":
            return click.BOOL
        case _:
            return click.STRING


def parse_value(definition: Option, text: str) -> Any:
    """Convert a text to a value of an option; if that is not possible, return it for :meth:`Option.violation`."""
    with contextlib.suppress(click.BadParameter):
        return _click_type(definition).convert(text, None, None)
    return text


def options(definitions: dict[str, Option]) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for each of ``definitions`` to a command, in their order."""

    def decorate(function: Any) -> Any:
        for name, definition in reversed(definitions.items()):
            flag = "--" + (definition.flag or name).replace("_", "-")
            add_option = click.option(flag, name, cls=ConfigOption, definition=definition)
            function = add_option(function)
        return function

    return decorate


def version_option() -> Callable[[Any], Any]:
    return click.version_option(__version__, prog_name="echo-async")


@contextlib.contextmanager
def _fast_exit(is_process: bool) -> Iterator[None]:
    """Exclude all objects from the garbage collection that the interpreter does at exit, which takes 10 ms."""
    yield
    if is_process:
        gc.freeze()


def run_command(command: click.Command, argv: Sequence[str] | None, obj: Any = None) -> int:
    """Run ``command`` with ``argv`` (default: the arguments of the process) and return its exit code.

    ``obj`` is that of its context.
    """
    with standard_streams(), _fast_exit(argv is None):
        try:
            return int(command.main(None if argv is None else list(argv), standalone_mode=False, obj=obj) or 0)
        except click.exceptions.Exit as stop:
            return stop.exit_code
        except click.Abort:
            return ExitCode.INTERRUPTED
        except SystemExit:  # raised by click if the reader of the help text has closed the pipe
            discard_output(sys.stdout)
            return ExitCode.SUCCESS
        except (click.ClickException, EchoError, OSError) as error:
            return _report(error)


def _report(error: click.ClickException | EchoError | OSError) -> ExitCode:
    """Print ``error`` as one line; return the exit code for it."""
    match error:
        case click.BadParameter() if error.param is not None:
            text, code = f"invalid {error.param.opts[0]}: {error.message}", ExitCode.INVALID_OPTION
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
