"""The documentation is correct: Python examples and shell sessions run, command lines parse, links resolve.

An HTML comment in the line before a code block selects how it is run:

- ``python`` without a comment is a program. ``await`` outside of functions runs in an event loop.
- ``<!-- given: server, client -->`` defines these names first; :func:`given` creates them.
- ``<!-- pytest -->`` marks a test module, which passes with the fixtures of this package alone.
- ``<!-- pytest: trio -->`` requires the module ``trio`` as well. Without it the example is only compiled, and its
  test is skipped.
- ``<!-- file: client.py -->`` is a file that the sessions after it in the document find in their directory. A later
  one of the same name replaces it.
- ``console`` is a shell session: lines that begin with ``$`` are run, the other lines are the output. Port 5500 stands
  for the port in ``ECHO_ASYNC_PORT``. A last line ``^C`` interrupts the command. Measured values, ports and
  timestamps may differ; ``...`` stands for any text.
- ``<!-- given: server -->`` starts a server in ``stream`` mode on that port before a session, and ``tls_server`` one
  in ``message`` mode whose CA certificate is in ``ca.pem``; ``udp_server`` also answers datagrams. Another name is a
  program: without it, the test is skipped.
- Sessions that only a translation shows, with the commands of the original, run where ``ALL_BACKENDS`` is set.
- ``<!-- not run -->`` marks a session whose commands are only parsed, as those of ``sh`` are.

The text after ``# ->`` in a Python example is the line that it prints. No example may warn, leave a task or thread
behind, or report an error to its event loop.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache
from itertools import dropwhile
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from types import CodeType
from typing import Any

import click
import pytest
import trustme
from support import ALL_BACKENDS, TIMEOUT, ChildProcess, reserve_port, run, without_slow_callbacks

import echo_async
import echo_async.testing  # a pytest run inside of pytest removes the modules that it imported first
from echo_async.cli import main, server
from echo_async.config import ServerOptions
from echo_async.testing import HostedServer

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("no_leaks")

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/*.md", "examples/*.md", "deploy/**/*.md", "tests/*.md", "docs/es/*.md")
DOCUMENTS = [each for pattern in PATTERNS for each in sorted(ROOT.glob(pattern))]
EXAMPLE_FILES = sorted((ROOT / "examples").glob("*.py"))

BLOCK = re.compile(
    r"^(?:<!-- (?P<kind>given|pytest|file|not run)(?:: (?P<names>[\w, .]+))? -->\n)?"
    r"```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
LINK = re.compile(r"\]\((?P<path>[^):#]*)(?:#(?P<anchor>[^)]*))?\)")
OPERATORS = set("();<>|&")
SERVERS = {"server", "tls_server", "udp_server"}
SESSIONS_AT_ONCE = 3  # they mostly wait
SHORT = {"DURATION": "0.1", "WARMUP": "0", "IDLE": "0.1"}  # options of bench and check
PLUGINS = {
    # pytest-socket warns of each connection that it blocks
    "pytest_socket": ("-p", "pytest_socket", "--disable-socket", "-W", "ignore:A test tried to use socket:UserWarning"),
    "pytest_asyncio": ("-p", "pytest_asyncio.plugin", "-o", "asyncio_default_fixture_loop_scope=function"),
}


@dataclass(frozen=True)
class Example:
    """A fenced code block of a document. ``line`` is the first line of its code."""

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
        names = re.findall(r"[\w.]+", found["names"] or "")
        document = str(path.relative_to(ROOT))
        yield Example(document, line, found["language"], found["kind"] or "", tuple(names), found["code"])


def script_of(example: Example) -> str:
    if example.language != "console":
        return example.code
    return "\n".join(line[2:] for line in example.code.splitlines() if line.startswith("$ "))


PYTHON = examples("python")
PROGRAMS = [each for each in PYTHON if each.kind in ("", "given")]
TEST_MODULES = [each for each in PYTHON if each.kind == "pytest"]
FILES = [each for each in PYTHON if each.kind == "file"]
CONSOLE = [each for each in examples("console") if each.kind != "not run"]


def test_docs_every_python_block_is_run() -> None:
    fences = sum(path.read_text().count("```py") for path in DOCUMENTS)
    assert len(PROGRAMS) + len(TEST_MODULES) + len(FILES) == fences


def test_docs_files_are_used_by_what_follows() -> None:
    for file in FILES:
        following = [each for each in FILES + CONSOLE if each.document == file.document and each.line > file.line]
        assert any(file.names[0] in each.code for each in following), file


# Programs


@asynccontextmanager
async def given(names: Sequence[str]) -> AsyncIterator[dict[str, Any]]:
    """Create what an example may use without creating it."""
    async with echo_async.serve(port=0, mode="stream") as server, echo_async.connect(*server.address) as client:
        if "certificates" in names:
            write_certificates(Path())
        values = {"server": server, "client": client, "certificates": None}
        yield {name: values[name] for name in names}


def write_certificates(directory: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(directory / "server.key"))
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(str(directory / "server.pem"), append=True)


def compile_example(example: Example) -> CodeType:
    """Compile an example with the line numbers of its document."""
    source = "\n" * (example.line - 1) + example.code
    code = compile(source, example.document, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    assert isinstance(code, CodeType)
    return code


async def run_in_loop(code: CodeType, names: Sequence[str]) -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    async with asyncio.timeout(TIMEOUT), given(names) as values:
        coroutine = eval(code, {"__name__": "__main__", **values})
        await coroutine
    if tasks := asyncio.all_tasks() - {asyncio.current_task()}:  # handlers of asyncio.start_server, about to end
        _, running = await asyncio.wait(tasks, timeout=TIMEOUT)
        assert not running
    assert errors == []


@pytest.mark.parametrize("example", PROGRAMS, ids=str)
def test_docs_program_prints_the_documented_lines(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile_example(example)
    if code.co_flags & inspect.CO_COROUTINE:
        run(lambda: run_in_loop(code, example.names))
    else:
        assert not example.names, "only an example with await can use given names"
        exec(code, {"__name__": "__main__"})
    printed = capsys.readouterr()
    if expected := re.findall(r"# -> (.*)", example.code):
        assert printed.out.splitlines() == expected
    assert printed.err == ""


# Test modules


@pytest.mark.parametrize("example", TEST_MODULES, ids=str)
def test_docs_test_module_passes(example: Example, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_example(example)
    for name in example.names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: the example was only compiled")
    plugins = [word for name in example.names for word in PLUGINS.get(name, ())]
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(example.code)
    result = pytester.runpytest_inprocess(
        *("-W", "error", "-W", "ignore::pytest.PytestAssertRewriteWarning"),  # imported before; fails until pytest 9.2
        *("-p", "echo_async.pytest_plugin", *plugins),
    )
    assert set(result.parseoutcomes()) == {"passed"}


# Shell sessions


@dataclass(frozen=True)
class Session:
    """The commands of examples, which several documents can show, and what must exist before."""

    names: tuple[str, ...]
    script: str
    files: tuple[tuple[str, str], ...]


def session_of(example: Example) -> Session:
    """The session of an example, with the files of the document that precede it."""
    script = script_of(example)
    preceding = [each for each in FILES if each.document == example.document and each.line < example.line]
    files = {each.names[0]: each.code for each in preceding if each.names[0] in script}
    if example.code.endswith("\n^C\n"):
        script = f"exec {script}"
    return Session(example.names, script, tuple(files.items()))


def expected_lines(example: Example) -> list[str]:
    return [line for line in example.code.splitlines() if not line.startswith("$ ") and line != "^C"]


SESSIONS: dict[Session, list[Example]] = {}
for each in CONSOLE:
    SESSIONS.setdefault(session_of(each), []).append(each)


WITH_SESSIONS = dict.fromkeys(examples[0].document for examples in SESSIONS.values())


@pytest.mark.parametrize("document", [each for each in WITH_SESSIONS if ALL_BACKENDS or "/es/" not in each])
def test_docs_sessions_print_the_documented_output(document: str, tmp_path: Path) -> None:
    """A session that several documents show runs once, with the first of them."""
    sessions = [session for session, examples in SESSIONS.items() if examples[0].document == document]
    programs = {program: shutil.which(program) for session in sessions for program in session.names}
    missing = {program for program, path in programs.items() if path is None} - SERVERS
    runnable = [each for each in sessions if missing.isdisjoint(each.names)]
    directories = [tmp_path / str(number) for number in range(len(runnable))]
    for directory in directories:  # first: what is written while another thread starts a process can be busy (ETXTBSY)
        make_checkout(directory)
    with ThreadPoolExecutor(SESSIONS_AT_ONCE) as pool:
        outputs = list(pool.map(run_session, runnable, directories))
    for session, output in zip(runnable, outputs, strict=True):
        for example in SESSIONS[session]:
            expected = expected_lines(example)
            assert len(output) == len(expected) or "..." in expected, (example, output)
            printed = "".join(f"{normalize(line)}\n" for line in output)
            assert re.fullmatch(pattern(expected), printed), (example, output)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def run_session(session: Session, directory: Path) -> list[str]:
    """Run a session in a directory made by ``make_checkout``; return what it printed."""
    with ExitStack() as stack:
        port = start_given(session.names, directory, stack)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("ECHO_ASYNC_", "MAKE"))},
            **{f"ECHO_ASYNC_{name}": value for name, value in SHORT.items()},
            "PATH": f"{directory / '.venv' / 'bin'}:{os.environ['PATH']}",
            "ECHO_ASYNC_PORT": str(port),
            "VENV": ".venv",
        }
        for name, code in session.files:
            (directory / name).write_text(re.sub(r"\b5500\b", str(port), code))
        script = re.sub(r"\b5500\b", str(port), session.script)
        return run_script(script, directory, environment, len(expected_lines(SESSIONS[session][0])))


def make_checkout(directory: Path) -> None:
    """Link the source tree into a directory, with an environment in which ``make`` has nothing to set up."""
    programs = directory / ".venv" / "bin"
    programs.mkdir(parents=True)
    for each in ROOT.iterdir():
        if not each.name.startswith("."):
            (directory / each.name).symlink_to(each)
    for name, arguments in (("python", ""), ("echo-async", "-m echo_async")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    (directory / ".venv" / ".installed").touch()


def start_given(names: tuple[str, ...], directory: Path, stack: ExitStack) -> int | None:
    """Start the server that a session requires, if any. Returns the port of the session."""
    if "server" in names:
        return stack.enter_context(HostedServer()).port
    if "udp_server" in names:
        return stack.enter_context(HostedServer(udp=True)).port
    if "tls_server" in names:
        write_certificates(directory)
        certfile, keyfile = str(directory / "server.pem"), str(directory / "server.key")
        return stack.enter_context(HostedServer(mode="message", ssl_certfile=certfile, ssl_keyfile=keyfile)).port
    return stack.enter_context(reserve_port())


def run_script(script: str, directory: Path, environment: dict[str, str], lines: int) -> list[str]:
    """Run a script; interrupt it if it still runs after ``lines`` lines. Returns what it printed."""
    streams = {"stdin": DEVNULL, "stdout": PIPE, "stderr": STDOUT, "text": True}
    with ChildProcess(["bash", "-c", script], cwd=directory, env=environment, **streams) as process:
        output = [line for _, line in zip(range(lines), process.stdout, strict=False)]
        if script.startswith("exec "):
            process.send_signal(signal.SIGINT)
            process.wait(TIMEOUT)
        else:
            output += process.stdout
    return without_slow_callbacks("".join(output)).splitlines()


def normalize(line: str) -> str:
    """A line without what differs from run to run: timestamps, ports and measured times."""
    line = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", "TIMESTAMP", line)
    line = re.sub(r"(?<=127\.0\.0\.1:)\d+|(?<=localhost:)\d+", "PORT", line)
    line = re.sub(r" {2,}", "  ", line).rstrip()  # the columns of a table are as wide as the values
    number = r"\d{1,3}(,\d{3})+\*?|\d+\.\d+(e-\d+)?|\d+e-\d+|\d+(?= ms)"
    return re.sub(rf"(?<![\d.])({number})(?![\d.])", "MEASURED", line)


def pattern(expected: list[str]) -> str:
    """A regular expression for the expected lines."""
    lines = (f"{re.escape(normalize(line))}\n" if line != "..." else "(.*\n)*" for line in expected)
    return "".join(lines).replace(re.escape("..."), ".*")


# Command lines


def commands(code: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, as words without operators and redirections."""
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


def indented_commands(path: Path) -> str:
    """The command lines in the docstring of an example file."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return "\n".join(line for line in docstring.splitlines() if line.startswith("    "))


SCRIPTS = [*map(script_of, examples("sh", "bash", "console")), *map(indented_commands, EXAMPLE_FILES)]
COMMAND_LINES = [
    list(dropwhile(re.compile(r"[A-Z_]+=").match, words)) for script in SCRIPTS for words in commands(script)
]
PACKAGE_COMMANDS = [words[1:] for words in COMMAND_LINES if words[0] == "echo-async" and words[1:]]


def test_docs_command_lines_are_accepted() -> None:
    assert {words[0] for words in PACKAGE_COMMANDS} >= {"server", "client", "check", "run", "bench"}
    for words in PACKAGE_COMMANDS:
        command: click.Command = main.command
        arguments = words
        while isinstance(command, click.Group) and not arguments[0].startswith("-"):
            _, found, arguments = command.resolve_command(click.Context(command), arguments)
            assert found is not None
            command = found
        with suppress(click.exceptions.Exit):  # by --help
            command.make_context(words[0], arguments).close()


def test_docs_library_lists_the_options_it_does_not_have() -> None:
    section = (ROOT / "docs" / "library.md").read_text().partition("\n### Options\n")[2].partition("```")[0]
    names = set(re.findall(r"`(\w+)`", section)) - {"serve", "labels"}
    assert names == set(server.OPTIONS) - set(ServerOptions.__annotations__)


def test_docs_programs_and_targets_of_the_repository_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {word for words in COMMAND_LINES if words[0] == "make" for word in words[1:]} <= set(targets)
    words = {word for words in COMMAND_LINES for word in words[:2]}
    paths = sorted(filter(re.compile(r"(\.ci|benchmarks|examples|tests)/").match, words))
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_example_files_import_existing_names() -> None:
    for node in (node for path in EXAMPLE_FILES for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("echo_async"):
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


# Links


def test_docs_links_resolve() -> None:
    for document in DOCUMENTS:
        for found in LINK.finditer(document.read_text()):
            target = document.parent / found["path"] if found["path"] else document
            assert target.exists(), f"{document}: {found[0]}"
            if found["anchor"]:
                assert found["anchor"] in anchors(target), f"{document}: {found[0]}"


def anchors(document: Path) -> set[str]:
    """The anchors that Markdown creates for headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


# Log events


def log_events() -> Iterator[list[str]]:
    """The rows of the table in docs/server.md: level, text, counters, metrics."""
    section = (ROOT / "docs" / "server.md").read_text().partition("\n## Log events\n")[2].partition("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| ") and "`" in line:
            yield [cell.strip() for cell in line.strip("|").split("|")]


LOG_EVENTS = list(log_events())


def source_texts() -> Iterator[str]:
    """The text constants of the package; ``%s`` stands for what is formatted into them."""
    for path in (ROOT / "echo_async").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "%s" for part in node.values)
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@cache
def log_patterns() -> tuple[list[re.Pattern[str]], set[str]]:
    """What each text can be once values are formatted into it, and the words of all texts."""
    texts = list(source_texts())
    fixed = [re.split(r"%[drsg]", text) for text in texts]
    # A text without words of its own would match everything.
    patterns = [re.compile(".*".join(map(re.escape, parts))) for parts in fixed if len("".join(parts)) >= 9]
    return patterns, set(re.findall(r"\w+", " ".join(texts)))


def test_docs_log_events_are_in_the_source() -> None:
    patterns, known_words = log_patterns()
    for event in (row[1].strip("`") for row in LOG_EVENTS):
        texts = {event, event.removeprefix("<peer> ")}
        assert any(pattern.fullmatch(text) for pattern in patterns for text in texts), event
        words = re.findall(r"[a-zA-Z_]{2,}", re.sub(r"<[\w ]+>", "", event))
        assert [word for word in words if word not in known_words] == []


def test_docs_log_event_counters_and_metrics_exist() -> None:
    counters = {name for row in LOG_EVENTS for name in re.findall(r"`(\w+)`", row[2])}
    assert counters <= {each.name for each in fields(echo_async.Stats)}
    metrics = {name for row in LOG_EVENTS for name in re.findall(r"`echo_async_(\w+?)(?:_total)?[`{]", row[3])}
    assert metrics
    assert [name for name in sorted(metrics) if name not in log_patterns()[1]] == []


# Layout


def test_docs_package_layout_names_every_file_once() -> None:
    section = (ROOT / "docs" / "architecture.md").read_text().partition("\n## The package\n")[2].partition("\n## ")[0]
    documented = []
    for item in section.split("\n- ")[1:]:
        (folder,) = re.findall(r"^\*\*`(\w+/)`\*\*", item) or [""]
        documented += [f"{folder}{name}" for name in re.findall(r"`(\w+\.py)`", item)]
    package = ROOT / "echo_async"
    existing = [str(each.relative_to(package)) for each in package.rglob("*.py") if not each.name.startswith("__")]
    assert sorted(documented) == sorted(existing)
