"""What one process of a load saw: a sample for each read that finished messages, and what went wrong.

Samples are kept, all of them, as numbers in arrays (24 bytes each), so that percentiles are exact. They go to
the parent as they are: a line of JSON, then the arrays.
"""

from __future__ import annotations

import json
import resource
from array import array
from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any, BinaryIO

__all__ = ["LATE", "Recorder", "read_results", "write_results"]

LATE = 0.001  # seconds after it was due from which a message counts as sent late


class Recorder:
    """Counts of one process. The samples, and what is ``in_window``, are those since :meth:`restart`."""

    def __init__(self) -> None:
        self.service = array("d")  # seconds from sending to the last byte of the reply
        self.waits = array("d")  # seconds from the moment a message was due until it was sent
        self.counts = array("Q")  # how many messages have these times
        self.answered = 0
        """Since the very beginning."""
        self.behind = 0
        """Messages that the generator itself came to late, whatever their connections did."""
        self.lost = 0
        self.failures: Counter[str] = Counter()
        self.mismatch: dict[str, Any] | None = None
        self._restarted = perf_counter()
        self._cpu = cpu_seconds()
        self._window: dict[str, float] = {}

    def add(self, due: float, sent: float, now: float, messages: int) -> None:
        self.service.append(now - sent)
        self.waits.append(sent - due)
        self.counts.append(messages)

    def scheduled(self, *, late: bool) -> None:
        if late:
            self.behind += 1

    def restart(self) -> None:
        """The warm-up is over: forget its samples, not its failures."""
        self.answered += sum(self.counts)
        for samples in (self.service, self.waits, self.counts):
            del samples[:]
        self.behind = 0
        self._restarted, self._cpu = perf_counter(), cpu_seconds()

    def end_window(self) -> None:
        """The time is over: what comes back from now on has a latency, but is not part of the rate."""
        self._window = {
            "seconds": perf_counter() - self._restarted,
            "in_window": sum(self.counts),
            "cpu_seconds": cpu_seconds() - self._cpu,
        }

    def as_json(self) -> dict[str, Any]:
        return {
            **self._window,
            "answered": self.answered + sum(self.counts),
            "behind": self.behind,
            "lost": self.lost,
            "failures": self.failures,
            "mismatch": self.mismatch,
            "samples": len(self.counts),
        }


def cpu_seconds() -> float:
    """CPU time of this process so far, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def write_results(recorder: Recorder, out: BinaryIO) -> None:
    out.write(json.dumps(recorder.as_json()).encode() + b"\n")
    for samples in (recorder.service, recorder.waits, recorder.counts):
        out.write(samples.tobytes())
    out.flush()


def read_results(line: bytes, read: Callable[[int], bytes]) -> tuple[dict[str, Any], bytes, bytes, bytes]:
    """The facts, and the bytes of the three arrays (``d``, ``d`` and ``Q``); ``line`` was read already."""
    facts = json.loads(line)
    size = 8 * facts["samples"]
    return facts, read(size), read(size), read(size)
