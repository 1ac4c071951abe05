"""The package as a whole: exports, side effects of the import, metadata."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
import tomllib
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from support import run_process

import echo_async

ROOT = Path(echo_async.__file__).parent
PACKAGES = pkgutil.walk_packages(echo_async.__path__, "echo_async.")
MODULES = sorted(found.name for found in PACKAGES if not found.name.endswith("__main__"))


def python(code: str) -> CompletedProcess[str]:
    """Run a program in a new interpreter in which warnings are errors."""
    return run_process([sys.executable, "-W", "error", "-c", code], cwd=ROOT.parent)


def test_package_import_is_light() -> None:
    """Of what every public name imports, beyond asyncio."""
    code = "import asyncio, sys; before = set(sys.modules); from echo_async import *; print(*set(sys.modules) - before)"
    result = python(code)
    assert result.stderr == ""
    imported = set(result.stdout.split())
    assert "echo_async.wire.conversation" in imported
    assert not imported & {"click", "uvloop", "multiprocessing", "json", "importlib.metadata", "prometheus_client"}
    assert not imported & {"argparse", "echo_async.wire.faults"}


def test_only_a_server_with_faults_imports_faults() -> None:
    code = """
import asyncio, sys
import echo_async, echo_async.cli.server
async def main(engine, options):
    async with echo_async.serve(port=0, engine=engine, **options) as server:
        assert await echo_async.echo("Hola", *server.address) == "Hola"
for options in ({}, {"fault": "delay=0"}):
    for engine in ("streams", "protocol", "threads"):
        asyncio.run(main(engine, options))
    print(*(name for name in sys.modules if name.endswith((".faults", ".scripts"))))
"""
    result = python(code)
    assert result.stderr == ""
    without, with_faults = result.stdout.split("\n")[:2]
    assert without == ""
    assert set(with_faults.split()) == {"echo_async.wire.faults", "echo_async.server.scripts"}


def test_package_import_has_no_side_effects() -> None:
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
print(*(name for name in sys.modules if 'echo_async' in name))
"""
    result = python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "echo_async\n", "")  # submodules: on first use
    assert set(echo_async.__all__) <= set(dir(echo_async))
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        echo_async.missing  # noqa: B018


def test_package_exports_match_its_typed_imports() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    *_, typed = [node for node in tree.body if isinstance(node, ast.If)]
    names = {each.name for node in typed.body if isinstance(node, ast.ImportFrom) for each in node.names}
    assert names == set(echo_async.__all__)


def test_old_python_is_told_which_one_is_needed() -> None:
    result = python("import sys; sys.version_info = (3, 10, 13); import echo_async")
    required = "ImportError: echo-async requires Python 3.11 or newer; this is 3.10"
    assert result.stderr.splitlines()[-1] == required


def test_blocking_api_in_use_imports_no_asyncio() -> None:
    code = """
import sys
from echo_async import sync
with sync.serve(port=0, udp=True, proxy_protocol="v1") as server:
    pass
with sync.serve(port=0, fault="delay=0.001", mode="stream") as server, sync.connect(*server.address) as client:
    assert list(client.stream(["one", "two"])) == ["one", "two"]
assert "asyncio" not in sys.modules
"""
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "")


def test_errors_are_exported_and_form_one_tree() -> None:
    errors = importlib.import_module("echo_async.errors")
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    assert len(classes) > 5
    for each in classes:
        assert each.__name__ in echo_async.__all__
        assert issubclass(each, echo_async.EchoError)
        assert each.__name__ in (errors.__doc__ or "")


def test_module_has_docstring_and_valid_exports() -> None:
    assert {"echo_async.wire.conversation", "echo_async.engines.streams", "echo_async.cli.server"} <= set(MODULES)
    for module in MODULES:
        loaded = importlib.import_module(module)
        assert loaded.__doc__, module
        missing = [name for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)]
        assert missing == [], f"{module} exports {missing}, which do not exist"


def test_package_classifiers_are_tested_versions() -> None:
    root = Path(__file__).parent.parent
    classifiers = tomllib.loads((root / "pyproject.toml").read_text())["project"]["classifiers"]
    classified = {each.rpartition(" ")[2] for each in classifiers if re.search(r":: 3\.\d+$", each)}
    tested = re.search(r"for version in ([\d. ]+);", (root / ".ci" / "run").read_text())
    assert tested
    assert classified == {"3.11", "3.12", "3.13", "3.14", "3.15"} == set(tested[1].split())


def test_errors_derive_from_builtin_exceptions() -> None:
    assert issubclass(echo_async.ConfigError, ValueError)
    assert issubclass(echo_async.MessageError, ValueError)
    assert issubclass(echo_async.ConnectError, ConnectionError)
    assert issubclass(echo_async.ConnectTimeout, echo_async.ConnectError)
    assert issubclass(echo_async.ConnectTimeout, TimeoutError)
    assert issubclass(echo_async.ReplyLost, ConnectionError)
    assert issubclass(echo_async.ReplyLate, TimeoutError)
    assert not issubclass(echo_async.StartError, ConnectionError)
