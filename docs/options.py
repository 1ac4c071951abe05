"""Writes the option tables in docs/*.md, from the definitions that the commands use: ``make docs``.

A table stands between the comments ``<!-- options: client -->`` and ``<!-- /options -->``. That of ``check`` has what
``client`` does not have. The options of ``server`` are listed by hand, by topic; a test compares them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from echo_async.cli.check import OPTIONS as CHECK_OPTIONS
from echo_async.cli.client import OPTIONS as CLIENT_OPTIONS
from echo_async.config import FLAG, Option

COMMANDS = {
    "client": CLIENT_OPTIONS,
    "check": {name: option for name, option in CHECK_OPTIONS.items() if CLIENT_OPTIONS.get(name) != option},
}
TABLE = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- /options -->)", re.S)


def update(text: str) -> str:
    """Return ``text`` with its option tables replaced."""
    return TABLE.sub(lambda found: f"{found[1]}\n{table(COMMANDS[found[2]])}\n{found[3]}", text)


def table(options: Mapping[str, Option]) -> str:
    rows = ["| option | default | description |", "|---|---|---|"]
    rows += [row(name, option) for name, option in options.items()]
    return "\n".join(rows) + "\n"


def row(name: str, option: Option) -> str:
    usage = f"{flag(name, option)} {option.kind.metavar}".strip()
    cells = [f"`{usage}`", default(option), option.help.rstrip(".")]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("* ", "`*` ") for cell in cells) + " |"


def flag(name: str, option: Option) -> str:
    return f"--{(option.flag or name).replace('_', '-')}"


def default(option: Option) -> str:
    has_default = option.kind is not FLAG and option.default is not None
    number_or_text = f"{option.default:g}" if isinstance(option.default, float) else option.default
    return f"`{number_or_text}`" if has_default else option.default_text


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("*.md")):
        path.write_text(update(path.read_text()))
