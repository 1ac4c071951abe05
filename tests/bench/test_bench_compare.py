"""The command ``bench compare``: table, JSON, picture, exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from support import TIMEOUT, ChildProcess, single_error_line, wait_until

from echo_async import StartError
from echo_async.bench.server import ServerProcess
from echo_async.cli.bench import main

SHORT = ("--rounds", "1", "--warmup", "0.02")


def compare(*arguments: str) -> int:
    """Run a short comparison; return the exit code. Measure longer if a busy machine answers no message in time."""
    is_disturbed = "--disturb" in arguments
    if not is_disturbed:
        arguments = ("--connections", "2", *arguments)
    for duration in ("0.3" if is_disturbed else "0.1", "4"):
        with redirect_stderr(StringIO()) as stderr:
            code = main(["compare", *SHORT, *arguments, "--duration", duration])
        if "no replies within" not in stderr.getvalue():
            break
    sys.stderr.write(stderr.getvalue())
    return code


@pytest.mark.timeout(180)  # on a busy machine, the processes start slowly
def test_compare_prints_a_table_and_saves_every_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--engines", "threads,protocol", "--loops", "uvloop", "--chunk-sizes", "20", "--sizes", "1000")
    files = (tmp_path / "compare.json", tmp_path / "compare.svg")
    assert compare(*options, "--rounds", "2", "--save", str(files[0]), "--plot", str(files[1])) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"1,000 bytes per message, 2 connections, 1 in flight on each; 2 rounds of [0-9.]+ s\n", out)
    titles = ["server", "messages/s", "ratio", "CPU µs", "p50 ms", "p99 ms"]
    assert any(all(title in line for title in titles) for line in out.splitlines())
    assert any(line.strip().startswith("threads 20 B ") and "1.00 (1.00-1.00)" in line for line in out.splitlines())
    facts = json.loads(files[0].read_text())
    check_results(facts)
    machine = facts["machine"]
    assert {"date", "echo_async", "python", "uvloop", "system", "processor", "cpus", "memory_gib"} <= set(machine)
    assert machine["python"].endswith(sys.version.split()[0])
    picture = files[1].read_text()
    assert picture.startswith("<?xml")
    assert "<svg" in picture


def check_results(facts: dict[str, Any]) -> None:
    assert (facts["rounds"], facts["connections"], facts["base"]) == (2, 2, "threads 20 B")
    names = ["threads 20 B", "protocol uvloop"]
    results = facts["results"]
    assert [(each["model"], each["size"]) for each in results] == [(name, 1000) for name in names]
    for each in results:
        assert len(each["messages_per_second_rounds"]) == len(each["cpu_per_message_rounds"]) == 2
        assert each["messages_per_second"] > 0
        assert 0 < each["cpu_per_message"] < 0.01
        ratio = each["cpu_per_message_ratio"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert 0 < each["service_time"]["p50"] <= each["service_time"]["p99"]
    assert results[0]["messages_per_second_ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_compare_beside_a_flood_reports_round_trips_and_its_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--disturb", "flood", "--engines", "protocol", "--loops", "asyncio", "--sizes", "64")
    files = (tmp_path / "flood.json", tmp_path / "flood.svg")
    assert compare(*options, "--save", str(files[0]), "--plot", str(files[1])) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search("^64 bytes per message, 1 connection, 1 in flight on each beside a flood; 1 round of", out, re.M)
    titles = ["server", "p50 ms", "p99 ms", "ratio", "max ms", "flood MB/s"]
    assert any(all(title in line for title in titles) for line in out.splitlines())
    facts = json.loads(files[0].read_text())
    [result] = facts["results"]
    assert (facts["disturbance"], facts["connections"], result["idle_cpu"]) == ("flood", 1, None)
    assert len(result["flood_bytes_per_second_rounds"]) == len(result["p99_rounds"]) == 1
    assert result["flood_bytes_per_second"] > 0
    assert result["messages_per_second"] <= 1000  # a millisecond apart
    assert 0 < result["service_time"]["p50"] <= result["service_time"]["p99"] <= result["longest"]
    assert "<svg" in files[1].read_text()


def test_compare_beside_idle_connections_reports_idle_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--disturb", "idle=150", "--engines", "protocol", "--loops", "asyncio", "--json")
    assert compare(*options) == 0
    facts = json.loads(capsys.readouterr().out)
    [result] = facts["results"]
    assert (facts["disturbance"], result["flood_bytes_per_second"]) == ("idle=150", None)
    assert 0 <= result["idle_cpu"] < 1
    assert 0 < result["service_time"]["p99"] <= result["longest"]


def test_compare_sigint_exits_130_without_output() -> None:
    command = [sys.executable, "-m", "echo_async.bench", "compare", "--engines", "protocol", "--duration", "60"]
    with ChildProcess(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(
            lambda: any("echo_async.bench.worker" in each and sockets >= 10 for each, sockets in children(process.pid))
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out, err.strip()) == (130, b"", b"")


def children(pid: int) -> list[tuple[str, int]]:
    """Return the command line and the number of open sockets of each child process."""
    found = []
    for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):  # the process exited
            descriptors = [os.readlink(each) for each in Path(f"/proc/{number}/fd").iterdir()]
            found.append((Path(f"/proc/{number}/cmdline").read_text(), sum("socket:" in each for each in descriptors)))
    return found


def test_compare_server_without_replies_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--engines", "protocol", "--loops", "asyncio", "--sizes", "10000")
    assert main(["compare", *options, "--duration", "1e-6", "--warmup", "0"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "cannot measure protocol asyncio: no replies within 1e-06 s; increase --duration" in err


INVALID = [
    *("--engines fibers", "--loops asyncio,", "--sizes 1,x", "--plot picture.txt", "--plot /nonexistent/picture.svg"),
    *("--disturb waves", "--disturb idle=0", "--disturb idle=3000000000", "--disturb flood --mode message"),
]


def test_compare_invalid_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for options in INVALID:
        assert main(["compare", *options.split()]) == 2
        single_error_line(*capsys.readouterr())


def test_compare_plot_without_matplotlib_exits_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", "--plot", str(tmp_path / "picture.svg")]) == 3
    assert "pip install 'echo-async[bench]'" in capsys.readouterr().err


def test_compare_unwritable_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--engines", "protocol", "--loops", "asyncio", "--sizes", "100")
    assert compare(*options, "--save", "/proc/facts.json") == 1
    assert capsys.readouterr().err == "error: cannot write /proc/facts.json: no such file or directory\n"


def test_server_process_failed_start_shows_its_output() -> None:
    for command, output in (
        (["sh", "-c", "echo invalid option >&2; exit 1"], "invalid option"),
        (["echo", "hello"], "hello"),
        (["/nonexistent/server"], "no such file"),
    ):
        with pytest.raises(StartError, match=output), ServerProcess(command):
            pass
