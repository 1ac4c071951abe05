"""The structure of the package, read from its source: imports and exports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import echo_async

ROOT = Path(echo_async.__file__).parent


def module_name(path: Path) -> str:
    parts = ("echo_async", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


@cache
def imported_names(module: str) -> set[str]:
    """Absolute names, wherever in the file they are imported: at the top, for types only, inside a function."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            submodules = (f"{source}.{alias.name}" for alias in node.names)
            names |= {each if each in FILES else source for each in submodules}
    return names


def test_package_imports_have_no_circle() -> None:
    graph = {module: imported_names(module) & set(FILES) for module in FILES}
    assert [*TopologicalSorter(graph).static_order()]  # raises CycleError


# What the pure modules may import, besides each other: nothing that reads, writes, waits or logs.
PURE_IMPORTS = {
    *("__future__", "base64", "builtins", "collections", "collections.abc", "contextlib", "dataclasses", "enum"),
    *("functools", "io", "ipaddress", "itertools", "json", "math", "random", "re", "struct", "sys"),
    *("types", "typing", "zlib"),
    "time",  # for its clocks
    "ssl",  # for its TLS in memory
    "echo_async.errors",
}
CONVERSIONS = {"AF_INET", "AF_INET6", "inet_ntop", "inet_pton"}  # of the socket module: they do no IO
PURE_CLIENT = {
    f"echo_async.client.{name}" for name in ("batching", "datagram_tracker", "session", "stream", "verifier")
}


def test_pure_modules_import_nothing_that_does_io() -> None:
    pure = {module for module in FILES if module.startswith("echo_async.wire")} | PURE_CLIENT
    for module in pure:
        names = imported_names(module) - pure - PURE_IMPORTS
        assert names <= {"socket"}, module
        froms = [
            node for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom) and node.module == "socket"
        ]
        assert {alias.name for node in froms for alias in node.names} <= CONVERSIONS, module
        assert bool(froms) is ("socket" in names), module


# Folders that those of another folder must not import: the layers are wire, engines, server, service, and their users.
ABOVE_SERVICE = ("client", "sync", "check", "cli", "bench")
FORBIDDEN = {
    "wire": ("engines", "server", "service", *ABOVE_SERVICE),
    "engines": ("server", "service", *ABOVE_SERVICE),
    "server": ("service", *ABOVE_SERVICE),
    "service": ABOVE_SERVICE,
    "check": ("engines", "server", "service", "sync", "cli", "bench"),  # it judges any echo server
}
# What only these folders and modules import.
POSIX = ("fcntl", "grp", "pwd", "resource", "termios", "tty")
USERS = {"click": {"cli"}, "echo_async.check": {"cli", "check"}, **{each: {"compat"} for each in POSIX}}


def imports(module: str, package: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for name in imported_names(module))


def test_folder_imports_no_folder_that_it_must_not_know() -> None:
    for folder, others in FORBIDDEN.items():
        for module in FILES:
            if f"{module}.".startswith(f"echo_async.{folder}.") and not module.endswith("__main__"):
                assert not [each for each in others if imports(module, f"echo_async.{each}")], module


def test_package_with_few_users_is_imported_by_no_other() -> None:
    for package, users in USERS.items():
        found = {f"{module}.".split(".")[1] for module in FILES if imports(module, package)}
        assert found <= users, package
        assert found or package in POSIX


def test_engines_know_neither_faults_nor_identify() -> None:
    for path in (ROOT / "engines").glob("*.py"):
        assert set(re.findall(r"(?i)\w*(?:fault|identif)\w*", path.read_text())) <= {"default"}, path.name


def test_engines_have_one_connection_class_each() -> None:
    classes = {
        node.name: [ast.unparse(base) for base in node.bases]
        for module in FILES
        if module.startswith("echo_async.engines")
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ClassDef) and "Connection" in node.name and node.name != "ServerContext"
    }
    assert classes.pop("Connection") == []
    assert sorted(classes) == ["ProtocolConnection", "StreamConnection", "ThreadConnection"]
    assert {bases[0] for bases in classes.values()} == {"Connection"}


# The tests


TESTS = sorted(Path(__file__).parent.rglob("*.py"))
WAITS = {"wait", "join", "communicate"}
PROCESS_CALLS = {"run", "call", "check_call", "check_output"}


def calls_without_limit(source: str) -> Iterator[str]:
    """What can wait without an end, also after the timeout of a test has failed it."""
    nodes = list(ast.walk(ast.parse(source)))
    awaited = {id(node.value) for node in nodes if isinstance(node, ast.Await)}
    for node in nodes:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if (name := node.func.attr) not in (*WAITS, *PROCESS_CALLS, "Popen", "Thread"):
            continue
        owner = ast.unparse(node.func.value)
        options = {each.arg for each in node.keywords}
        is_endless = name in WAITS and not node.args and not options
        is_endless &= owner.rpartition(".")[2] not in ("self", "server")  # ``ServerProcess.wait`` has a limit
        is_endless |= owner == "subprocess" and name in PROCESS_CALLS and "timeout" not in options
        is_endless |= (owner, name) == ("subprocess", "Popen")
        is_endless |= (owner, name) == ("threading", "Thread") and "daemon" not in options
        if is_endless and id(node) not in awaited:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def test_tests_wait_for_processes_and_threads_with_a_limit() -> None:
    """Processes are started with ``ChildProcess``, threads as daemons: none keeps the tests from their end."""
    assert [f"{path.name} {call}" for path in TESTS for call in calls_without_limit(path.read_text())] == []
