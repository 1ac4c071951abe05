"""The samples and failures of one load generator process.

All samples are kept, 16 bytes for each read that completes messages and 8 more in an open loop, so that percentiles are
exact. The parent process gets one line of JSON, followed by the arrays.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any, BinaryIO, NamedTuple

LATE_THRESHOLD = 0.001  # seconds after it was due from which a message counts as sent late


class Recorder:
    """Samples since the end of the warm-up; failures since the start."""

    def __init__(self, *, is_open_loop: bool) -> None:
        self._is_open_loop = is_open_loop
        self.service_times = array("d")  # seconds from sending to the last byte of the reply
        self.delays = array("d")  # in an open loop: seconds from the time at which a message was due until it was sent
        self.counts = array("q")  # number of messages with these times
        self.answered = 0
        """Messages answered before the end of the warm-up."""
        self.late_by_generator = 0
        self.lost = 0
        self.duplicated = 0
        """Further replies to a datagram that has one."""
        self.failures: Counter[str] = Counter()
        self.mismatch: dict[str, Any] | None = None
        self.is_stopped = False
        self._started = perf_counter()
        self._cpu = process_time()
        self._window: dict[str, float] = {}

    def add(self, due: float, sent: float, now: float, messages: int) -> None:
        self.service_times.append(now - sent)
        self.counts.append(messages)
        if self._is_open_loop:
            self.delays.append(sent - due)

    def add_loss(self, reason: str, messages: int) -> None:
        if not self.is_stopped:
            self.lost += messages
            self.failures[reason] += 1

    def add_mismatch(self, connection: int, message: int, offset: int, details: str) -> None:
        """Record that a reply is not an echo, and stop the load."""
        self.mismatch = {"connection": connection, "message": message, "offset": offset, "what": details}
        self.is_stopped = True

    def end_warmup(self) -> None:
        """Discard the samples of the warm-up, but not its failures."""
        self.answered += sum(self.counts)
        for samples in (self.service_times, self.delays, self.counts):
            del samples[:]
        self.late_by_generator = 0
        self._started, self._cpu = perf_counter(), process_time()

    def end_window(self) -> None:
        """End the time over which the rate is computed; later replies still count for the latency."""
        self._window = {
            "seconds": perf_counter() - self._started,
            "in_window": sum(self.counts),
            "cpu_seconds": process_time() - self._cpu,
        }

    def write(self, out: BinaryIO) -> None:
        """Write the result for :func:`read_result`."""
        facts = {
            **self._window,
            "answered": self.answered + sum(self.counts),
            "late_by_generator": self.late_by_generator,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "failures": self.failures,
            "mismatch": self.mismatch,
            "samples": len(self.counts),
            "delays": len(self.delays),
        }
        out.write(json.dumps(facts).encode() + b"\n")
        for samples in (self.service_times, self.delays, self.counts):
            out.write(samples.tobytes())
        out.flush()


class ProcessResult(NamedTuple):
    """The result of one process; the arrays are bytes of C doubles, and ``counts`` of 64-bit integers."""

    facts: dict[str, Any]
    service_times: bytes
    delays: bytes
    counts: bytes


def read_result(line: bytes, read: Callable[[int], bytes]) -> ProcessResult:
    """Parse the first line of a result, and ``read`` the arrays that follow it."""
    facts = json.loads(line)
    size = 8 * facts["samples"]
    return ProcessResult(facts, read(size), read(8 * facts["delays"]), read(size))
