"""``echo-async check``: what a path, or a server, preserves; one line per check."""

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import click

from ..check.checks import CHECKS, FIRST_CHECKS, run_checks
from ..check.context import ModeName, Settings
from ..check.result import Result
from ..compat import raise_descriptor_limit
from ..config import FLAG, SECONDS, Option, choice, integer
from ..stdio import discard_output, print_error
from .client import OPTIONS as CLIENT_OPTIONS
from .client import make_endpoint
from .common import CONTEXT, ExitCode, options, refuse_conflicts, run_command, version_option

SHARED_OPTIONS = (
    *("host", "port", "uds", "timeout", "connect_timeout", "ssl", "server_hostname", "send_proxy", "proxy_source"),
    *("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_no_verify"),
)
_MODE_HELP = "What the server does with messages: see echo-async server. auto: found out by trying."
DEFAULTS = Settings()
OPTIONS = {
    **{name: CLIENT_OPTIONS[name] for name in SHARED_OPTIONS},
    "mode": Option(DEFAULTS.mode, _MODE_HELP, choice(get_args(ModeName))),
    "connections": Option(DEFAULTS.connections, "Connections at once.", integer(2, 10_000)),
    "size": Option(DEFAULTS.size, "Bytes of the largest message, newline included.", integer(1, 2**30)),
    "idle": Option(DEFAULTS.idle, "Seconds for which a connection is silent.", SECONDS),
    "udp": Option(DEFAULTS.udp, "Check datagrams as well.", FLAG),
    "json": Option(False, "Print a JSON object per check.", FLAG),
    "quiet": Option(False, "Print only the checks that failed.", FLAG),
}
COLORS = {"ok": "green", "failed": "red", "skipped": "yellow"}
WIDTH = max(len(each.name) for each in CHECKS)

HELP = """Check what an echo server, and the path to it, preserve: bytes, packets, half-close, resets, many clients.

It works with every echo server that answers line by line or byte by byte, and through proxies and tunnels.
Each check is a line: its name, ok, failed or skipped, and what was seen.

\b
Examples:
  echo-async check
  echo-async check --host proxy.example --port 7 --timeout 3
  echo-async check --mode message --size 65536 --json

\b
Exit codes:
  0 nothing failed                1 something failed
  2 invalid option                3 could not connect
  130 Ctrl-C                      141 stdout was closed by its reader
"""


class Output:
    """Prints results to stdout, and which check runs if that is a terminal."""

    def __init__(self, *, quiet: bool, json: bool) -> None:
        self._is_quiet, self._is_json = quiet, json
        self._is_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._has_colors = self._is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def print_start(self, name: str) -> None:
        if self._is_terminal and not self._is_json:
            self._write(f"{name} ...\r")

    def print_result(self, result: Result) -> None:
        if not self._is_quiet or result.result == "failed":
            self._write(self._format(result) + "\n")
        elif self._is_terminal and not self._is_json:
            self._write(" " * (WIDTH + len(" ...")) + "\r")

    def _format(self, result: Result) -> str:
        if self._is_json:
            return json.dumps({**asdict(result), "seconds": round(result.seconds, 6)}, ensure_ascii=False)
        outcome = f"{result.result:<7}"
        if self._has_colors:
            outcome = click.style(outcome, COLORS[result.result])
        details = result.reason or result.seen
        if result.result == "failed":
            details = f"expected {result.expected}; seen {result.seen}: {result.reason}"
        return f"{result.check:<{WIDTH}}  {outcome}  {details}"

    def _write(self, text: str) -> None:
        if sys.stdout is not None:
            print(text, end="", flush=True)


@click.command(help=HELP, context_settings=CONTEXT)
@options(OPTIONS)
@version_option()
def command(**values: Any) -> int:
    if values["udp"]:
        refuse_conflicts(values, "udp", ["uds"])
    output = Output(quiet=values["quiet"], json=values["json"])
    endpoint = make_endpoint(values, print_error)
    settings = Settings(**{name: values[name] for name in ("mode", "connections", "size", "idle", "udp")})
    raise_descriptor_limit()
    code = ExitCode.SUCCESS
    try:
        for result in run_checks(endpoint, settings, output.print_start):
            output.print_result(result)
            if result.result == "failed":
                code = ExitCode.UNAVAILABLE if result.check in FIRST_CHECKS[:2] else ExitCode.FAILURE
    except BrokenPipeError:
        discard_output(sys.stdout)
        return ExitCode.OUTPUT_CLOSED
    return code


main = partial(run_command, command)
