"""Child processes of the commands: what they import and inherit, and how they report back."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import sys
import zipapp
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE

import click
import pytest
from support import TIMEOUT, run_process

import echo_async
from echo_async.bench.plan import LoadPlan
from echo_async.children import start_child
from echo_async.testing import HostedServer

SHORT = ("--rounds", "1", "--duration", "0.5", "--warmup", "0", "--json")
COMPARE = ("bench", "compare", "--engines", "protocol", "--loops", "asyncio", "--sizes", "64", *SHORT)
WORKERS = ("run", "--workers", "2", "--", "sh", "-c", 'echo "$ECHO_ASYNC_PORT"')
# The interpreter without the package; in a virtual environment, its children find the package anyway.
BARE = (getattr(sys, "_base_executable", sys.executable), "-S")


@pytest.mark.parametrize("arguments", [WORKERS, COMPARE], ids=["workers", "compare"])
def test_children_do_not_import_files_of_the_directory(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "echo_async").mkdir()
    for file in ("selectors", "json", "logging", "queue", "runpy", "echo_async/__init__"):
        (tmp_path / f"{file}.py").write_text("raise SystemExit(__file__)")
    script = Path(sys.executable).with_name("echo-async")
    done = run_process([sys.executable, "-W", "error", script, *arguments], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_children_find_the_package_in_a_zipapp(tmp_path: Path) -> None:
    for module in (echo_async, click):
        folder = Path(module.__file__ or "").parent
        shutil.copytree(folder, tmp_path / "app" / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz", main="echo_async.cli.main:main")
    done = run_process([*BARE, "app.pyz", *WORKERS], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().isdecimal()


PROBE = """
import sys
names = ("optimize", "dev_mode", "isolated", "ignore_environment", "no_user_site", "utf8_mode")
print([getattr(sys.flags, name) for name in names], sys.warnoptions, sys.path, flush=True)
"""


@pytest.mark.parametrize(
    "flags", [["-I", "-X", "dev"], ["-E", "-s", "-OO", "-W", "error::UserWarning", "-X", "utf8=0"]]
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
    done = run_process([sys.executable, *flags, "-c", code], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    parent, child = done.stdout.splitlines()
    assert child == parent


@pytest.mark.parametrize("module", ["echo_async.bench.worker", "echo_async.service.worker"])
def test_child_without_settings_ends_without_output(module: str) -> None:
    """Ctrl-C, or a kill, can end the parent while it starts the child."""
    process, channel = start_child(module, stderr=PIPE)
    with process, channel:
        channel.sendall(b'{"loop":')
        channel.close()
        assert process.communicate(timeout=TIMEOUT)[1] == b""


def test_load_process_without_a_parent_ends_without_output(echo_server: HostedServer) -> None:
    plan = LoadPlan(address=echo_server.address, family=socket.AF_INET)
    process, channel = start_child("echo_async.bench.worker", stderr=PIPE)
    with process, channel:
        channel.sendall(json.dumps({"plan": asdict(plan), "first": 0}).encode() + b"\n")
        assert select.select([channel], [], [], TIMEOUT)[0]  # the process is ready
        channel.close()
        assert process.communicate(timeout=TIMEOUT)[1] == b""


def test_load_processes_ignore_ctrl_c_and_the_encoding(tmp_path: Path, echo_server: HostedServer) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'echo_async.bench.worker' in sys.orig_argv:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    load = ("--port", str(echo_server.port), "--mode", "stream", "--processes", "2", "--connections", "2", *SHORT[2:])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-16"}
    done = run_process([sys.executable, "-m", "echo_async.bench", "load", *load], env=environment, encoding="utf-16")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["messages"] > 0
