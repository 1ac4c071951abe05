"""``echo-async`` and ``python -m echo_async``: subcommands, environment variables, shell completion."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from support import Cli, is_echoed, run_process, server_process

import echo_async
from echo_async.cli import main
from echo_async.cli.bench import installed_loops

ROOT = Path(echo_async.__file__).parent.parent
SCRIPT = Path(sysconfig.get_path("scripts")) / "echo-async"
GROUP = (sys.executable, "-m", "echo_async")

# What Kubernetes sets, among others, in every container of a namespace with the Service echo-async.
SERVICE_LINKS = {
    "ECHO_ASYNC_SERVICE_HOST": "10.96.113.7",
    "ECHO_ASYNC_SERVICE_PORT": "5500",
    "ECHO_ASYNC_PORT": "tcp://10.96.113.7:5500",
    "ECHO_ASYNC_PORT_5500_TCP": "tcp://10.96.113.7:5500",
    "ECHO_ASYNC_PORT_5500_TCP_PROTO": "tcp",
}


def test_help_without_docstrings_is_the_same(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """``-OO`` removes docstrings."""
    monkeypatch.setenv("COLUMNS", "80")
    names = ["", "server", "client", "check", "run", "bench", "bench load", "bench compare"]
    code = f"import echo_async.cli.main as cli; exit(sum(cli.main([*name.split(), '--help']) for name in {names}))"
    done = run_process([sys.executable, "-OO", "-c", code])
    assert (done.returncode, done.stderr) == (0, "")
    help_texts = "".join(cli.output(f"{name} --help") for name in names)
    expected, found = (
        [line for line in text.splitlines() if not line.startswith("Usage: ")]  # which has the name of the program
        for text in (help_texts, done.stdout)
    )
    assert expected.count("  Examples:") == len(names)
    assert found == expected


def test_commands_without_assertions_work() -> None:
    optimized = (sys.executable, "-OO", *GROUP[1:])
    done = run_process([*optimized, "run", "--mode", "stream", "--", *optimized, "client", "one", "two"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "")


@pytest.mark.parametrize("program", [GROUP, (str(SCRIPT),)], ids=["module", "script"])
def test_group_names_the_program(program: tuple[str, ...]) -> None:
    if not Path(program[0]).exists():
        pytest.skip("the package is not installed")
    done = run_process([*program, "client", "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    name = "python -m echo_async" if program is GROUP else "echo-async"
    assert done.stdout.startswith(f"Usage: {name} client ")


def test_group_imports_only_the_subcommand() -> None:
    for arguments, unused in (
        (["client", "--port", "1"], {"server.server", "cli.run", "cli.bench", "cli.ping", "cli.datagram_ping", "tls"}),
        (["server", "--port", "x"], {"client.client", "cli.run", "cli.bench", "server.supervisor", "engines.threads"}),
    ):
        code = f"""
import sys
before = set(sys.modules)  # those of coverage, where it is measured
from echo_async.cli.main import main
main({arguments!r})
print(*set(sys.modules) - before)
"""
        imported = set(run_process([sys.executable, "-c", code]).stdout.split())
        assert f"echo_async.cli.{arguments[0]}" in imported
        assert imported & {"json", "random", "multiprocessing", *(f"echo_async.{name}" for name in unused)} == set()


# Writes the process in which each loop is created to the file ``loops``.
CUSTOM_LOOP = """
import asyncio, os
def new_event_loop():
    with open("loops", "a") as file:
        print(os.getpid(), file=file)
    return asyncio.new_event_loop()
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_server_runs_on_the_given_loop_factory(workers: int, tmp_path: Path) -> None:
    (tmp_path / "custom_loop.py").write_text(CUSTOM_LOOP)
    options = ("--loop", "custom_loop:new_event_loop", "--workers", str(workers), "--log-level", "error")
    with server_process(*options, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}) as running:
        with running.connect() as client:
            assert is_echoed(client)
        serving = set(running.worker_pids) or {running.process.pid}
        assert running.stop() == ""
    assert len(serving) == workers
    assert serving <= {int(line) for line in (tmp_path / "loops").read_text().split()}


def test_bench_loops_auto_is_every_installed_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    named = "uvloop:new_event_loop"
    assert installed_loops([named, "auto", "asyncio"]) == [named, "asyncio", "uvloop"]
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert installed_loops(["auto"]) == ["asyncio"]


@pytest.mark.parametrize(("scheme", "workers"), [("tcp", 2), ("udp", 1), ("sctp", 1)])
def test_service_links_are_ignored_with_a_warning_each(
    scheme: str, workers: int, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers and the command of ``run`` get no such variable, or they would warn as well."""
    link = f"{scheme}://10.96.113.7:5500"
    for name, value in {**SERVICE_LINKS, "ECHO_ASYNC_PORT": link, "ECHO_ASYNC_METRICS_PORT": link}.items():
        monkeypatch.setenv(name, value)
    done = cli(f"run --workers {workers} --", *GROUP, "client")
    assert (done.code, done.out) == (0, "Hola Server!\n")
    assert sorted(done.err.splitlines()) == [
        f"warning: ignoring ECHO_ASYNC_{name}={link}: set by Kubernetes for a Service (enableServiceLinks)"
        for name in ("METRICS_PORT", "PORT")
    ]


def test_completion_protocol_of_bash(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {**SERVICE_LINKS, "_ECHO_ASYNC_COMPLETE": "bash_complete"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["echo-async"])
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # click takes the name of the program from both
    for words, expected in (
        ("echo-async ", {"server", "client", "check", "run", "bench"}),
        ("echo-async server --timeout-i", {"--timeout-idle"}),
        ("echo-async server --mode ", {"message", "stream", "raw", "identify"}),
        ("echo-async bench ", {"load", "compare"}),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        assert main.main() == 0
        out, err = capsys.readouterr()
        assert ({line.partition(",")[2] for line in out.splitlines()}, err) == (expected, "")


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
    done = run_process([shell, "-c", SHELLS[shell]], env={**os.environ, **env}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["--timeout-idle"]
