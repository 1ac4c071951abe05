"""What the commands share: one line for a bad option, options that come from the environment as well."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from .. import __version__
from ..errors import ConfigError, EchoError, describe_error
from ..stdio import discard_output, print_error, standard_streams

__all__ = ["BAD_OPTION", "CONTEXT", "Seconds", "run_command", "version_option"]

CANNOT_WRITE = 1
BAD_OPTION = 2

CONTEXT = {
    "auto_envvar_prefix": "ECHO_ASYNC",
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "show_default": True,
}


class Seconds(click.ParamType[float]):
    """A time that can pass: a number over 0, finite; or 0 too, where ``zero`` says so."""

    name = "seconds"

    def __init__(self, *, zero: bool = False) -> None:
        self.zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        if 0 < seconds < float("inf") or (self.zero and seconds == 0):
            return seconds
        self.fail(f"{value} makes no sense: give seconds, {'0 or' if self.zero else ''} more than 0.", param, ctx)


def version_option() -> Callable[[Any], Any]:
    return click.version_option(__version__, prog_name="echo-async")


def run_command(command: click.Command, argv: Sequence[str] | None) -> int:
    """Run ``command`` and return its exit code. A bad option is one line on stderr, and exit code 2."""
    with standard_streams():
        return _run(command, argv)


def _run(command: click.Command, argv: Sequence[str] | None) -> int:
    try:
        code = command.main(None if argv is None else list(argv), standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        return 130
    except (click.ClickException, ConfigError) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print_error(" ".join(text.split()))
        return BAD_OPTION
    except SystemExit:  # what click makes of a help text that nobody reads to its end
        discard_output(sys.stdout)
        return 0
    except EchoError:
        raise  # some are errors of the system as well
    except OSError as error:  # a full disk
        discard_output(sys.stdout)
        print_error(f"cannot write to stdout: {describe_error(error)}")
        return CANNOT_WRITE
    return int(code or 0)
