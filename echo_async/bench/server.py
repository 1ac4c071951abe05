"""A server in a process of its own, for as long as it is measured: started, reached, its CPU time read, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Self

from ..config import EngineName, Mode
from ..errors import StartError
from ..loops import LoopName

__all__ = ["ServerProcess", "server_command"]

STOP = 10  # seconds until a server that does not end is killed


def server_command(engine: EngineName, loop: LoopName, chunk_size: int, mode: Mode, size: int) -> list[str]:
    """The command of this package's server, on a free port, with the access log off."""
    return [
        *(sys.executable, "-m", "echo_async.server", "--host", "127.0.0.1", "--port", "0"),
        *("--engine", engine, "--loop", loop, "--chunk-size", str(chunk_size), "--mode", mode),
        *("--limit-message-size", str(max(size, 1_048_576)), "--log-level", "error", "--no-access-log"),
    ]


class ServerProcess:
    """Any server that writes ``listening on HOST:PORT`` to stdout; within ``with``, on ``cpus`` if any are named."""

    def __init__(self, command: Sequence[str], cpus: Sequence[int] = ()) -> None:
        self._command = command
        self._cpus = cpus
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process

    def __enter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ECHO_ASYNC_")}
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors, env=environment
            )
        except OSError as error:
            self._errors.close()
            raise StartError(f"cannot start {self._command[0]}: {error.strerror}") from error
        try:
            if self._cpus:  # threads that it makes later are there as well
                os.sched_setaffinity(self._process.pid, self._cpus)
            self.address = self._listening()
        except BaseException:
            self._end(signal.SIGKILL)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(signal.SIGTERM)

    def cpu_seconds(self) -> float | None:
        """CPU time of the process so far, of threads that have ended as well; None where there is no such clock."""
        with suppress(OSError, AttributeError):
            if sys.platform == "linux":
                return time.clock_gettime((~self._process.pid << 3) | 2)  # what clock_getcpuclockid(3) makes of a pid
        return None

    def _listening(self) -> tuple[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        place = line.removeprefix("listening on ").strip()
        host, _, port = place.rpartition(":")
        if place == line.strip() or not port.isdecimal():
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = (line + self._errors.read().decode(errors="replace")).strip().splitlines() or ["nothing"]
            raise StartError(f"cannot start {' '.join(self._command)}: it says {said[-1]!r}")
        return host.strip("[]"), int(port)

    def _end(self, number: int) -> None:
        self._process.send_signal(number)
        try:
            self._process.wait(STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()
