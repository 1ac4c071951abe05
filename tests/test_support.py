"""What the tests rely on: processes that they start end with them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from support import run_process, wait_until

STUBBORN = "trap '' TERM INT HUP; sleep 60 & echo started; wait; wait"
ENDLESS_TEST = f"""
from subprocess import PIPE
from support import ChildProcess

def test_that_times_out():
    with ChildProcess(["sh", "-c", {STUBBORN!r}], stdout=PIPE, text=True) as process:
        print("group", process.pid)
        assert process.stdout.readline() == "started\\n"
        process.wait(600)
"""


def is_group(number: int) -> bool:
    """Return whether a process group has a process that runs."""
    groups = (each.read_text().rpartition(")")[2].split() for each in Path("/proc").glob("[0-9]*/stat"))
    try:
        return any(int(fields[2]) == number and fields[0] != "Z" for fields in groups)
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_test_that_times_out_ends_its_processes(tmp_path: Path) -> None:
    (tmp_path / "test_endless.py").write_text(ENDLESS_TEST)
    options = ("-q", "-p", "pytest_timeout", "-o", "timeout=1", "-o", f"pythonpath={Path(__file__).parent}")
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = run_process([sys.executable, "-m", "pytest", *options, "test_endless.py"], cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "1 failed" in done.stdout
    group = int(done.stdout.partition("group ")[2].split()[0])
    wait_until(lambda: not is_group(group))
