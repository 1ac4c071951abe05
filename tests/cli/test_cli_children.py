"""Child processes of the commands: what they import and inherit, and how they report back."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import zipapp
from pathlib import Path
from subprocess import CompletedProcess

import click
import pytest
from support import run_process, single_error_line, without_slow_callbacks

import echo_async
from echo_async.cli import server
from echo_async.testing import HostedServer

SHORT = ("--duration", "0.5", "--warmup", "0", "--json")
LOAD = ("bench", "load", "--mode", "stream", "--processes", "2", "--connections", "2", *SHORT)
COMPARE = ("bench", "compare", "--engines", "protocol", "--loops", "asyncio", "--sizes", "64", "--rounds", "1", *SHORT)
# The interpreter without the package; in a virtual environment, its children find the package anyway.
BARE = (getattr(sys, "_base_executable", sys.executable), "-S")
PRINT_PORT = ("sh", "-c", 'echo "$ECHO_ASYNC_PORT"')
COMMANDS = {"workers": ("run", "--workers", "2", "--", *PRINT_PORT), "load": LOAD, "compare": COMPARE}


def execute(*command: str, cwd: Path, env: dict[str, str] | None = None) -> CompletedProcess[str]:
    done = run_process(command, cwd=cwd, env={**os.environ, **(env or {})})
    done.stderr = without_slow_callbacks(done.stderr)
    return done


def arguments_of(name: str, echo_server: HostedServer) -> tuple[str, ...]:
    return (*COMMANDS[name], *(("--port", str(echo_server.port)) if name == "load" else ()))


@pytest.mark.parametrize("name", COMMANDS)
def test_children_do_not_import_files_of_the_directory(name: str, tmp_path: Path, echo_server: HostedServer) -> None:
    (tmp_path / "echo_async").mkdir()
    for file in ("selectors", "json", "logging", "queue", "runpy", "echo_async/__init__"):
        (tmp_path / f"{file}.py").write_text("raise SystemExit(__file__)")
    script = Path(sys.executable).with_name("echo-async")
    done = execute(sys.executable, "-W", "error", str(script), *arguments_of(name, echo_server), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["workers", "compare"])
def test_children_find_the_package_on_sys_path(name: str, tmp_path: Path, echo_server: HostedServer) -> None:
    """Only the program has it there, as a wrapper or a debugger does."""
    path = [str(Path(echo_async.__file__).parents[1]), sysconfig.get_path("purelib")]
    code = f"import sys; sys.path += {path}; from echo_async.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = execute(*BARE, "-c", code, *arguments_of(name, echo_server), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_children_find_the_package_in_a_zipapp(tmp_path: Path) -> None:
    for module in (echo_async, click):
        folder = Path(module.__file__ or "").parent
        shutil.copytree(folder, tmp_path / "app" / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz", main="echo_async.cli.main:main")
    done = execute(*BARE, "app.pyz", *COMMANDS["workers"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().isdecimal()


PROBE = """
import sys
names = ("optimize", "dev_mode", "isolated", "ignore_environment", "no_user_site", "utf8_mode")
print([getattr(sys.flags, name) for name in names], sys.warnoptions, sys.path, flush=True)
"""


@pytest.mark.parametrize(
    "flags", [["-I"], ["-E", "-s", "-OO"], ["-W", "error::UserWarning"], ["-X", "dev"], ["-X", "utf8=0"]]
)
def test_children_have_flags_and_path_of_the_parent(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    code = f"""
import subprocess, sys
sys.path.insert(0, {str(tmp_path)!r})
import probe
from echo_async.children import child_command
sys.exit(subprocess.call(child_command("probe")))
"""
    done = execute(sys.executable, *flags, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    parent, child = done.stdout.splitlines()
    assert child == parent


def test_children_that_cannot_start_are_one_error_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert server.main(["--port", "0", "--workers", "2"]) == 3
    reason = "error: cannot start /nonexistent/python: no such file or directory\n"
    assert single_error_line(*capsys.readouterr()) == reason


def test_load_processes_report_in_any_encoding(echo_server: HostedServer) -> None:
    command = [sys.executable, "-m", "echo_async", *arguments_of("load", echo_server)]
    done = run_process(command, env={**os.environ, "PYTHONIOENCODING": "utf-16"}, encoding="utf-16")
    assert json.loads(done.stdout)["messages"] > 0


def test_load_processes_ignore_ctrl_c_from_the_start(tmp_path: Path, echo_server: HostedServer) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'echo_async.bench.worker' in sys.orig_argv:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    command = (sys.executable, "-m", "echo_async", *arguments_of("load", echo_server))
    done = execute(*command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["messages"] > 0
