"""The server process that a benchmark measures."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Self

from ..children import child_command
from ..config import EngineName, Mode
from ..errors import StartError, describe_error

STOP_TIMEOUT = 10  # seconds until a server that does not exit is killed


def server_command(engine: EngineName, loop: str, chunk_size: int, mode: Mode, size: int) -> list[str]:
    """Return the command of this package's server, on a free port and without access log."""
    return [
        *child_command("echo_async.server", "--host", "127.0.0.1", "--port", "0"),
        *("--engine", engine, "--loop", loop, "--chunk-size", str(chunk_size), "--mode", mode),
        *("--limit-message-size", str(max(size, 1_048_576)), "--log-level", "error", "--no-access-log"),
    ]


class ServerProcess:
    """Any server that prints ``listening on HOST:PORT``; runs within ``with``, pinned to ``cpus`` if there are any."""

    def __init__(self, command: Sequence[str], cpus: Sequence[int] = ()) -> None:
        self._command = command
        self._cpus = cpus
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process

    def __enter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ECHO_ASYNC_")}
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._stderr, env=environment
            )
        except OSError as error:
            self._stderr.close()
            raise StartError(f"cannot start {self._command[0]}: {describe_error(error)}") from error
        try:
            if self._cpus:  # inherited by the threads that it starts
                os.sched_setaffinity(self._process.pid, self._cpus)
            self.address = self._read_address()
        except BaseException:
            self._stop(signal.SIGKILL)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(signal.SIGTERM)

    def cpu_seconds(self) -> float | None:
        """Return the CPU time of the process, including its ended threads; None where there is no such clock."""
        with suppress(OSError, AttributeError):
            if sys.platform == "linux":
                return time.clock_gettime((~self._process.pid << 3) | 2)  # as clock_getcpuclockid(3) computes it
        return None

    def _read_address(self) -> tuple[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        address = line.removeprefix("listening on ").strip()
        host, _, port = address.rpartition(":")
        if address == line.strip() or not port.isdecimal():
            self._process.kill()
            self._process.wait()
            self._stderr.seek(0)
            output = (line + self._stderr.read().decode(errors="replace")).strip().splitlines() or ["no output"]
            raise StartError(f"cannot start {self._command[0]}: {output[-1]}")
        return host.strip("[]"), int(port)

    def _stop(self, signal_number: int) -> None:
        self._process.send_signal(signal_number)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._stderr.close()
