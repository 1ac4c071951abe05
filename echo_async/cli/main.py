"""``echo-async`` and ``python -m echo_async``: the commands as subcommands, each imported when it is run."""

from functools import partial
from importlib import import_module

import click

from .common import CONTEXT, Group, run_command, version_option


class LazyGroup(Group):
    """A group whose subcommands are the modules of this package with these names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["server", "client", "check", "run", "bench"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f".{cmd_name}", __package__).command
        return command


HELP = """TCP echo server and client: every byte comes back unchanged.

\b
Examples:
  echo-async server
  echo-async client 'Hola Server!'
  echo-async check
  echo-async run -- python -m pytest
  echo-async bench load --port 5500
"""


@click.group(cls=LazyGroup, help=HELP, context_settings=CONTEXT, no_args_is_help=False)
@version_option()
def command() -> None:
    """Run a subcommand."""


main = partial(run_command, command)
