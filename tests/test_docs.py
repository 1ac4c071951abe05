"""The documents tell the truth: their Python examples run, their command lines parse, their links lead somewhere.

How an example is run is said by an HTML comment in the line before it, and by nothing else:

- none: it is a program and runs as it stands. ``await`` may stand outside of functions; it runs in an event loop then;
- ``<!-- given: server, client -->``: the same, with these names there already; :class:`Given` makes them;
- ``<!-- pytest -->``: it is a test module, and passes with the fixtures of this package alone;
- ``<!-- pytest: trio -->``: it needs the module ``trio`` as well. Without it the example is only compiled, and its
  test is reported as skipped.

What stands in an example after ``# ->`` is what it prints, line by line. No example may warn, leave a task or a
thread behind, or have anything to report to its event loop.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import logging
import re
import shlex
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import click
import pytest
import trustme
from support import TIMEOUT, run

import echo_async
import echo_async.testing  # a session of pytest in pytest forgets what was first imported in it, and imports it again

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("no_leaks")

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(
    r"^(?:<!-- (?P<kind>\w+)(?:: (?P<names>[\w, ]+))? -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
LINK = re.compile(r"\]\((?P<path>[^):#]*)(?:#(?P<anchor>[^)]*))?\)")
OPERATORS = set("();<>|&")
PLUGINS = {
    "anyio": ("-p", "anyio.pytest_plugin"),
    "pytest_asyncio": ("-p", "pytest_asyncio.plugin", "-o", "asyncio_default_fixture_loop_scope=function"),
}


@dataclass(frozen=True)
class Example:
    """A fenced block of a document. ``line`` is where its code begins."""

    document: str
    line: int
    language: str
    kind: str
    names: tuple[str, ...]
    code: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def examples(*languages: str) -> list[Example]:
    return [each for path in DOCUMENTS for each in blocks(path) if each.language in languages]


def blocks(path: Path) -> Iterator[Example]:
    text = path.read_text()
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        names = re.findall(r"\w+", found["names"] or "")
        yield Example(path.name, line, found["language"], found["kind"] or "", tuple(names), found["code"])


PYTHON = examples("python")
PROGRAMS = [each for each in PYTHON if each.kind in ("", "given")]
TEST_MODULES = [each for each in PYTHON if each.kind == "pytest"]


def test_every_python_example_is_run() -> None:
    fences = sum(path.read_text().count("```py") for path in DOCUMENTS)
    assert len(PROGRAMS) + len(TEST_MODULES) == fences


# Programs


class Given:
    """What an example may take for granted; an attribute is made when it is first asked for."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._made: dict[str, Any] = {}

    async def __call__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = await getattr(self, f"_{name}")()
        return self._made[name]

    async def _server(self) -> echo_async.EchoServer:
        return await self._stack.enter_async_context(echo_async.serve(port=0, mode="stream"))

    async def _client(self) -> echo_async.EchoClient:
        address: Any = (await self("server")).address
        return await self._stack.enter_async_context(echo_async.connect(*address))

    async def _address(self) -> tuple[str, int]:
        """Nobody listens there, and nobody else will."""
        bound = self._stack.enter_context(socket.socket())
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        host, port = bound.getsockname()
        return host, port

    async def _certificates(self) -> None:
        """Files in the current directory."""
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost")
        authority.cert_pem.write_to_path("ca.pem")
        certificate.private_key_pem.write_to_path("server.key")
        for blob in certificate.cert_chain_pems:
            blob.write_to_path("server.pem", append=True)


@pytest.fixture
def loggers_of_examples() -> Iterator[None]:
    """The loggers are as they were."""
    names = ["echo_async", "echo_async.access", "echo_async.client", "echo_async.server"]
    loggers = [(each, each.level, list(each.handlers)) for each in map(logging.getLogger, names)]
    yield
    for each, level, handlers in loggers:
        each.setLevel(level)
        each.handlers[:] = handlers


def compiled(example: Example) -> CodeType:
    """With the line numbers of the document."""
    code = "\n" * (example.line - 1) + example.code
    made = compile(code, example.document, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    assert isinstance(made, CodeType)
    return made


async def run_in_loop(code: CodeType, names: tuple[str, ...]) -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with asyncio.timeout(TIMEOUT), AsyncExitStack() as stack:
        given = Given(stack)
        coroutine = eval(code, {"__name__": "__main__", **{name: await given(name) for name in names}})
        await coroutine
    if tasks := asyncio.all_tasks() - {asyncio.current_task()}:  # the handlers of asyncio.start_server, about to end
        _, running = await asyncio.wait(tasks, timeout=TIMEOUT)
        assert not running
    assert problems == []


@pytest.mark.usefixtures("loggers_of_examples")
@pytest.mark.parametrize("example", PROGRAMS, ids=str)
def test_a_program_prints_what_it_says(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = compiled(example)
    if code.co_flags & inspect.CO_COROUTINE:
        run(lambda: run_in_loop(code, example.names))
    else:
        assert not example.names, "only an example with await is given anything"
        exec(code, {"__name__": "__main__"})
    printed = capsys.readouterr()
    if expected := re.findall(r"# -> (.*)", example.code):
        assert printed.out.splitlines() == expected
    assert printed.err == ""


# Test modules


@pytest.mark.parametrize("example", TEST_MODULES, ids=str)
def test_a_test_module_passes(example: Example, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(example)
    for name in example.names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: the example was only compiled")
    plugins = [word for name in example.names for word in PLUGINS.get(name, ())]
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(example.code)
    result = pytester.runpytest_inprocess("-W", "error", "-p", "echo_async.pytest_plugin", *plugins)
    assert set(result.parseoutcomes()) == {"passed"}


# Command lines


def commands(code: str) -> Iterator[list[str]]:
    """The simple commands of a shell script: words, without what joins and redirects them."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= OPERATORS:
                words.append(word)
            elif words:
                yield words
                words = []


COMMAND_LINES = [words for each in examples("sh", "bash", "console") for words in commands(each.code)]
OURS = [words for words in COMMAND_LINES if words[:2] == ["python", "-m"] and words[2].startswith("echo_async.")]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_a_command_line_parses(words: list[str]) -> None:
    command: click.Command = importlib.import_module(words[2].replace("echo_async", "echo_async.cli")).command
    arguments = words[3:]
    if isinstance(command, click.Group):
        _, found, arguments = command.resolve_command(click.Context(command), arguments)
        assert found is not None
        command = found
    command.make_context(words[2], arguments).close()


def test_every_target_of_make_is_there() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {words[1] for words in COMMAND_LINES if words[0] == "make"} <= set(targets)


def test_command_lines_are_found() -> None:
    assert {words[2].removeprefix("echo_async.") for words in OURS} >= {"server", "client"}


# Links


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for found in LINK.finditer(document.read_text()):
        target = document.parent / found["path"] if found["path"] else document
        assert target.exists(), found[0]
        if found["anchor"]:
            assert found["anchor"] in anchors(target), found[0]


def anchors(document: Path) -> set[str]:
    """The names of headings, as they are made for Markdown."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
