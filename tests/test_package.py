"""The package as a whole: what it exports, and what importing it does not do."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import echo_async

ROOT = Path(echo_async.__file__).parent
MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(echo_async.__path__, "echo_async.")
    if not found.name.endswith("__main__")
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in which every warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, timeout=20, cwd=ROOT.parent
    )


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """The modules that are there once every public name is, and were not after ``import asyncio``."""
    code = "import asyncio, sys; before = set(sys.modules); from echo_async import *; print(*set(sys.modules) - before)"
    done = python("-c", code)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "name", ["click", "uvloop", "multiprocessing", "json", "importlib.metadata", "prometheus_client", "argparse"]
)
def test_importing_the_package_does_not_import(name: str, imported: set[str]) -> None:
    assert "echo_async.conversation" in imported
    assert name not in imported


def test_importing_the_package_changes_nothing_around_it() -> None:
    code = """
import asyncio, logging, signal, sys, threading
handlers = {each: signal.getsignal(each) for each in signal.valid_signals()}
import echo_async
assert {each: signal.getsignal(each) for each in signal.valid_signals()} == handlers
assert threading.active_count() == 1
assert logging.getLogger().handlers == []
assert logging.getLogger("echo_async").handlers == []
assert logging.getLogger("echo_async").level == logging.NOTSET
assert logging.raiseExceptions
assert asyncio.events._event_loop_policy is None
"""
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_exported_name_exists_once_and_in_order() -> None:
    assert len(set(echo_async.__all__)) == len(echo_async.__all__)
    assert sorted(echo_async.__all__) == sorted(set(echo_async.__all__))
    for name in echo_async.__all__:
        assert getattr(echo_async, name) is not None


def test_the_documented_names_are_exported() -> None:
    assert {"EchoServer", "ServerConfig", "Stats", "serve", "handle_echo"} <= set(echo_async.__all__)
    assert {"EchoClient", "connect", "echo"} <= set(echo_async.__all__)


def test_what_is_imported_into_the_package_is_exported() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    [typed] = [node for node in tree.body if isinstance(node, ast.If)]
    names = {each.name for node in typed.body if isinstance(node, ast.ImportFrom) for each in node.names}
    assert names == set(echo_async.__all__)


def test_importing_the_package_alone_brings_no_other_module_of_it() -> None:
    done = python("-c", "import sys, echo_async; print(*(name for name in sys.modules if 'echo_async' in name))")
    assert (done.stdout, done.stderr) == ("echo_async\n", "")
    assert set(echo_async.__all__) <= set(dir(echo_async))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        echo_async.nonsense  # noqa: B018


def test_every_error_is_exported_and_in_one_tree() -> None:
    errors = importlib.import_module("echo_async.errors")
    assert set(errors.__all__) <= set(echo_async.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), echo_async.EchoError)
        assert name in (errors.__doc__ or "")


def test_errors_can_be_caught_as_what_they_are_elsewhere() -> None:
    assert issubclass(echo_async.ConfigError, ValueError)
    assert issubclass(echo_async.MessageError, ValueError)
    assert issubclass(echo_async.ConnectError, ConnectionError)
    assert issubclass(echo_async.ConnectTimeout, echo_async.ConnectError)
    assert issubclass(echo_async.ConnectTimeout, TimeoutError)
    assert issubclass(echo_async.ReplyLost, ConnectionError)
    assert issubclass(echo_async.ReplyLate, TimeoutError)
    assert not issubclass(echo_async.StartError, ConnectionError)


def test_a_different_reply_tells_where_it_differs() -> None:
    error = echo_async.ReplyDifferent("byte 3 differs", 3)
    assert str(error) == "byte 3 differs"
    assert error.offset == 3


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_and_exports_what_it_has(module: str) -> None:
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name), f"{module} exports {name}, which it does not have"


def test_no_module_of_the_package_is_overlooked() -> None:
    assert {"echo_async.conversation", "echo_async.engines.streams", "echo_async.cli.server"} <= set(MODULES)


def test_the_conversation_imports_nothing_that_reads_writes_waits_or_logs() -> None:
    code = f"""
import runpy, sys
before = set(sys.modules)
names = runpy.run_path({str(ROOT / "conversation.py")!r})
talk = names["make_conversation"]("stream", 100)
assert talk.receive(b"one\\n") == b"one\\n"
print(*set(sys.modules) - before)
"""
    done = python("-I", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert not {"asyncio", "socket", "selectors", "threading", "logging", "time", "echo_async"} & set(
        done.stdout.split()
    )


def test_the_package_is_typed() -> None:
    assert (ROOT / "py.typed").exists()


@pytest.mark.parametrize("command", ["server", "client"])
def test_the_help_of_a_command_is_silent_on_stderr(command: str) -> None:
    done = python("-m", f"echo_async.{command}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")
    assert "Examples:" in done.stdout
