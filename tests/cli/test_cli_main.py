"""``echo-async`` and ``python -m echo_async``: subcommands, environment variables, shell completion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import click
import pytest
from support import TIMEOUT, server_process, single_error_line, without_slow_callbacks

import echo_async
from echo_async.cli import bench, client, main, run, server

ROOT = Path(echo_async.__file__).parent.parent
SCRIPT = Path(sysconfig.get_path("scripts")) / "echo-async"
GROUP = (sys.executable, "-m", "echo_async")
MODULES = {name: (sys.executable, "-m", f"echo_async.{name}") for name in ("server", "client", "bench")}
COMMANDS = {"server": server.command, "client": client.command, "run": run.command, "bench": bench.command}

# What Kubernetes sets in every container of a namespace with the Services echo-async and echo-async-metrics.
SERVICE_LINKS = {
    "ECHO_ASYNC_SERVICE_HOST": "10.96.113.7",
    "ECHO_ASYNC_SERVICE_PORT": "5500",
    "ECHO_ASYNC_SERVICE_PORT_ECHO": "5500",
    "ECHO_ASYNC_PORT": "tcp://10.96.113.7:5500",
    "ECHO_ASYNC_PORT_5500_TCP": "tcp://10.96.113.7:5500",
    "ECHO_ASYNC_PORT_5500_TCP_PROTO": "tcp",
    "ECHO_ASYNC_PORT_5500_TCP_PORT": "5500",
    "ECHO_ASYNC_PORT_5500_TCP_ADDR": "10.96.113.7",
    "ECHO_ASYNC_METRICS_SERVICE_HOST": "10.96.113.8",
    "ECHO_ASYNC_METRICS_SERVICE_PORT": "9100",
    "ECHO_ASYNC_METRICS_PORT_9100_TCP": "tcp://10.96.113.8:9100",
    "ECHO_ASYNC_METRICS_PORT_9100_TCP_PROTO": "tcp",
    "ECHO_ASYNC_METRICS_PORT_9100_TCP_PORT": "9100",
    "ECHO_ASYNC_METRICS_PORT_9100_TCP_ADDR": "10.96.113.8",
}
WARNING = (
    "warning: ignoring ECHO_ASYNC_PORT=tcp://10.96.113.7:5500: set by Kubernetes for a Service (enableServiceLinks)\n"
)


def execute(*command: str, env: dict[str, str] | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, **more
    )
    done.stderr = without_slow_callbacks(done.stderr)
    return done


# Subcommands


@pytest.mark.parametrize("name", ["", "server", "client", "run", "bench", "bench load", "bench compare"])
def test_help_without_docstrings_is_the_same(name: str) -> None:
    """``-OO`` removes docstrings."""
    optimized = execute(sys.executable, "-OO", *GROUP[1:], *name.split(), "--help")
    assert (optimized.returncode, optimized.stderr) == (0, "")
    assert optimized.stdout == execute(*GROUP, *name.split(), "--help").stdout
    assert "Examples:" in optimized.stdout


def test_commands_without_assertions_work() -> None:
    optimized = (sys.executable, "-OO", *GROUP[1:])
    done = execute(*optimized, "run", "--mode", "stream", "--", *optimized, "client", "one", "two")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "")


def test_group_has_every_command() -> None:
    context = click.Context(main.command)
    assert main.command.list_commands(context) == list(COMMANDS)
    for name, command in COMMANDS.items():
        assert main.command.get_command(context, name) is command


@pytest.mark.parametrize("program", [GROUP, (str(SCRIPT),)], ids=["module", "script"])
def test_group_runs_its_subcommands(program: tuple[str, ...]) -> None:
    if not Path(program[0]).exists():
        pytest.skip("the package is not installed")
    with server_process("--log-level", "error") as running:
        done = execute(*program, "client", "--port", str(running.address[1]), "hola")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hola\n", "")
    assert execute(*program, "--version").stdout.startswith("echo-async, version ")


@pytest.mark.parametrize("name", COMMANDS)
def test_subcommand_help_names_the_program(name: str) -> None:
    done = execute(*GROUP, name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: python -m echo_async {name} ")


@pytest.mark.parametrize("arguments", [[], ["missing"], ["--missing"], ["client", "--missing"]])
def test_group_invalid_arguments_are_one_line(arguments: list[str]) -> None:
    done = execute(*GROUP, *arguments)
    assert done.returncode == 2
    single_error_line(done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["client", "--port", "1"], {"server.server", "cli.run", "cli.bench", "cli.ping", "tls"}),
        (["server", "--port", "x"], {"client.client", "cli.run", "cli.bench", "server.supervisor", "engines.threads"}),
    ],
)
def test_group_imports_only_the_subcommand(arguments: list[str], unused: set[str]) -> None:
    code = f"""
import sys
before = set(sys.modules)  # those of coverage, where it is measured
from echo_async.cli.main import main
main({arguments!r})
print(*set(sys.modules) - before)
"""
    imported = set(execute(sys.executable, "-c", code).stdout.split())
    assert f"echo_async.cli.{arguments[0]}" in imported
    assert imported & {"json", "random", "multiprocessing", *(f"echo_async.{name}" for name in unused)} == set()


# Environment variables


@pytest.mark.parametrize("program", [(*GROUP, "bench"), MODULES["bench"]], ids=["group", "module"])
@pytest.mark.parametrize(
    ("subcommand", "name", "value"),
    [("load", "PORT", "70000"), ("load", "CONNECTIONS", "0"), ("load", "RATE", "x"), ("compare", "ROUNDS", "0")],
)
def test_bench_reads_its_options_from_the_environment(
    program: tuple[str, ...], subcommand: str, name: str, value: str
) -> None:
    done = execute(*program, subcommand, env={f"ECHO_ASYNC_{name}": value})
    assert done.returncode == 2
    assert f"{value!r} (must be" in single_error_line(done.stdout, done.stderr)


@pytest.mark.parametrize("program", [(*GROUP, "server"), MODULES["server"]], ids=["group", "module"])
def test_server_reads_its_options_from_the_environment(program: tuple[str, ...]) -> None:
    done = execute(*program, env={"ECHO_ASYNC_PORT": "70000"})
    assert single_error_line(done.stdout, done.stderr) == (
        "error: invalid ECHO_ASYNC_PORT: '70000' (must be an integer from 0 to 65535)\n"
    )


# Event loops

# Writes the process in which each loop is created to the file ``loops``.
CUSTOM_LOOP = """
import asyncio, os
def new_event_loop():
    with open("loops", "a") as file:
        print(os.getpid(), file=file)
    return asyncio.new_event_loop()
"""


@pytest.fixture
def custom_loop(tmp_path: Path) -> Path:
    """A directory with the module ``custom_loop``."""
    (tmp_path / "custom_loop.py").write_text(CUSTOM_LOOP)
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_server_runs_on_the_given_loop_factory(workers: int, custom_loop: Path) -> None:
    options = ("--loop", "custom_loop:new_event_loop", "--workers", str(workers), "--log-level", "error")
    with server_process(*options, cwd=custom_loop, env={"PYTHONPATH": str(ROOT)}) as running:
        done = execute(*MODULES["client"], "--port", str(running.address[1]))
        serving = set(running.worker_pids) or {running.process.pid}
        assert running.stop() == (0, "")
    assert done.stdout == "Hola Server!\n"
    assert len(serving) == workers
    assert serving <= {int(line) for line in (custom_loop / "loops").read_text().split()}


def test_bench_compare_measures_the_given_loop_factory(custom_loop: Path) -> None:
    pytest.importorskip("numpy")
    options = ("--engines", "protocol", "--loops", "custom_loop:new_event_loop,asyncio", "--sizes", "64", "--json")
    times = ("--rounds", "1", "--duration", "0.5", "--warmup", "0")
    env = {"PYTHONPATH": str(ROOT)}
    done = execute(*GROUP, "bench", "compare", *options, *times, cwd=custom_loop, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"model": "protocol custom_loop:new_event_loop"' in done.stdout
    assert (custom_loop / "loops").read_text().count("\n") >= 2


@pytest.mark.parametrize(
    ("command", "loop", "code", "reason"),
    [
        ("server", "custom", 2, "invalid --loop"),
        ("server", "custom:", 2, "invalid --loop"),
        ("server --workers 2", ":new", 2, "invalid --loop"),
        ("bench compare --sizes 64", "custom", 2, "invalid --loop"),
        ("server --workers 2", "missing:new", 3, "cannot use --loop missing:new: No module named 'missing'"),
        ("run", "missing:new", 3, "cannot use --loop missing:new: No module named 'missing'"),
        ("server", "os:getcwd", 3, "cannot use --loop os:getcwd: it returned "),
        ("bench compare --sizes 64", "os:getcwd", 3, "cannot use --loop os:getcwd: it returned "),
    ],
)
def test_loop_that_cannot_be_used_is_one_line(command: str, loop: str, code: int, reason: str) -> None:
    option = "--loops" if "bench" in command else "--loop"
    done = execute(*GROUP, *command.split(), option, loop, *(["--", "true"] if command == "run" else []))
    assert done.returncode == code
    assert reason in single_error_line(done.stdout, done.stderr)


@pytest.mark.parametrize("loop", ["uvloop", "uvloop:new_event_loop"])
def test_loop_conflicts_with_the_engine_threads(loop: str) -> None:
    done = execute(*GROUP, "server", "--loop", loop, "--engine", "threads")
    assert done.returncode == 2
    assert f"--loop {loop} conflicts with --engine threads" in single_error_line(done.stdout, done.stderr)


# Kubernetes


@pytest.mark.parametrize("options", [[], ["--workers", "2"], ["--threaded"]])
def test_server_ignores_service_links_with_one_warning(options: list[str]) -> None:
    with server_process(*options, "--log-level", "error", env=SERVICE_LINKS) as running:
        done = execute(*MODULES["client"], "--port", str(running.address[1]))
        code, log = running.stop()
    assert (code, log, done.stdout) == (0, WARNING, "Hola Server!\n")


def test_server_service_link_selects_the_default_port() -> None:
    """Nothing of the link is used."""
    context = server.command.make_context("server", [])
    assert context.params["port"] == 5500


@pytest.mark.parametrize("program", [(*GROUP, "client"), MODULES["client"]], ids=["group", "module"])
def test_client_ignores_service_links_with_one_warning(program: tuple[str, ...]) -> None:
    with server_process("--log-level", "error") as running:
        done = execute(*program, "--port", str(running.address[1]), "hola", env=SERVICE_LINKS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hola\n", WARNING)


def test_run_ignores_service_links_with_one_warning() -> None:
    done = execute(*GROUP, "run", "--", *MODULES["client"], env=SERVICE_LINKS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hola Server!\n", WARNING)


def test_bench_ignores_service_links_with_one_warning() -> None:
    pytest.importorskip("numpy")
    with server_process("--log-level", "error") as running:
        options = ("--port", str(running.address[1]), "--duration", "0.1", "--warmup", "0", "--json")
        done = execute(*GROUP, "bench", "load", *options, env=SERVICE_LINKS)
    assert (done.returncode, done.stderr) == (0, WARNING)


@pytest.mark.parametrize("name", ["PORT", "METRICS_PORT"])
@pytest.mark.parametrize("scheme", ["tcp", "udp", "sctp"])
def test_service_link_of_any_port_option_is_ignored(
    name: str, scheme: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"ECHO_ASYNC_{name}", f"{scheme}://10.96.113.8:9100")
    context = server.command.make_context("server", [], **server.command.context_settings)
    assert context.params[name.lower()] == server.OPTIONS[name.lower()].default
    assert capfd.readouterr().err == (
        f"warning: ignoring ECHO_ASYNC_{name}={scheme}://10.96.113.8:9100: "
        "set by Kubernetes for a Service (enableServiceLinks)\n"
    )


# Shell completion


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("echo-async ", {"server", "client", "run", "bench"}),
        ("echo-async server --timeout-i", {"--timeout-idle"}),
        ("echo-async server --mode ", {"message", "stream", "raw", "identify"}),
        ("echo-async run --eng", {"--engine"}),
        ("echo-async bench ", {"load", "compare"}),
        ("echo-async client --js", {"--json"}),
    ],
)
def test_completion_protocol_of_bash(words: str, expected: set[str]) -> None:
    env = {
        "_ECHO_ASYNC_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        **SERVICE_LINKS,
    }
    code = "import sys; sys.argv[0] = 'echo-async'; from echo_async.cli.main import main; sys.exit(main())"
    done = execute(sys.executable, "-c", code, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected


SHELLS = {
    "bash": """
        eval "$(_ECHO_ASYNC_COMPLETE=bash_source echo-async)"
        COMP_WORDS=(echo-async server --timeout-i) COMP_CWORD=2
        _echo_async_completion echo-async
        printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "zsh": """
        autoload -U compinit && compinit -u -d "$PWD/zcompdump"
        eval "$(_ECHO_ASYNC_COMPLETE=zsh_source echo-async)"
        _describe() { for each in ${(P)3}; do print -r -- ${each%%:*}; done }
        words=(echo-async server --timeout-i) CURRENT=3
        _echo_async_completion
    """,
    "fish": """
        _ECHO_ASYNC_COMPLETE=fish_source echo-async | source
        complete --do-complete 'echo-async server --timeout-i'
    """,
}


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_in_the_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None or not SCRIPT.exists():
        pytest.skip(f"{shell} or the script echo-async is not installed")
    env = {"PATH": f"{SCRIPT.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = execute(shell, "-c", SHELLS[shell], env=env, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["--timeout-idle"]
