"""The result of one load, over all of its processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Any

from .plan import LoadPlan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PERCENTILES = ("50", "90", "99", "99.9")
CPU_LIMIT = 0.95  # of a core: a generator that uses more limits the measurement


class Distribution:
    """Times in seconds, each with the number of messages that took it; percentiles are samples (nearest rank).

    ``count`` is the number of all messages.
    """

    def __init__(self, times: NDArray[np.float64], counts: NDArray[np.uint64]) -> None:
        order = times.argsort()
        self._times = times[order]
        self._ranks = counts[order].cumsum()
        self.count = int(self._ranks[-1]) if len(times) else 0
        self._sum = float(times @ counts)

    def percentile(self, percent: str | float) -> float:
        """Return the smallest sample that ``percent`` % of the messages do not exceed; 0 without messages."""
        if not self.count:
            return 0.0
        rank = max(1, ceil(Fraction(str(percent)) * self.count / 100))
        return float(self._times[self._ranks.searchsorted(rank)])

    @property
    def min(self) -> float:
        return self.percentile(0)

    @property
    def max(self) -> float:
        return self.percentile(100)

    @property
    def mean(self) -> float:
        return self._sum / self.count if self.count else 0.0

    def as_json(self) -> dict[str, Any]:
        percentiles = {f"p{percent}": self.percentile(percent) for percent in PERCENTILES}
        return {"min": self.min, "mean": self.mean, **percentiles, "max": self.max}


@dataclass(kw_only=True)
class LoadResult:
    """Times are in seconds."""

    plan: LoadPlan
    interrupted: bool = False
    """Ended early by Ctrl-C."""
    seconds: float = 0.0
    messages: int = 0
    """Answered within ``seconds``."""
    answered: int = 0
    """Answered at all: also during the warm-up and after the end."""
    late: int = 0
    """Sent more than a millisecond after their due time, for any reason."""
    late_by_generator: int = 0
    """Sent late because the generator was busy, not because the pipeline was full."""
    lost: int = 0
    duplicated: int = 0
    """Replies to datagrams that were received again."""
    failures: Counter[str] = field(default_factory=Counter)
    mismatch: dict[str, Any] | None = None
    generator_cpu: list[float] = field(default_factory=list)
    """Share of a core that each process used."""
    service: Distribution
    """Times from sending a message to the last byte of its reply."""
    response: Distribution | None
    """Times from when a message was due to the last byte of its reply; None in a closed loop."""

    @property
    def messages_per_second(self) -> float:
        return self.messages / self.seconds if self.seconds else 0.0

    @property
    def megabytes_per_second(self) -> float:
        """10**6 bytes of messages in one direction."""
        return self.messages_per_second * self.plan.size / 1e6

    @property
    def lost_share(self) -> float:
        """Of all messages."""
        return self.lost / max(1, self.lost + self.answered)

    @property
    def latency(self) -> Distribution:
        """The response times in an open loop, else the service times."""
        return self.service if self.response is None else self.response

    @property
    def is_generator_limited(self) -> bool:
        """Whether the load generator, not the server, limited the measurement."""
        sent = max(1, self.latency.count)
        return max(self.generator_cpu, default=0.0) > CPU_LIMIT or self.late_by_generator > sent / 100

    @property
    def is_complete(self) -> bool:
        """Whether every message was answered by its echo."""
        return not (self.lost or self.failures or self.mismatch)

    def describe_failures(self) -> str:
        """Return the mismatch, or the reasons of all failures with their numbers."""
        if self.mismatch is not None:
            where = "reply mismatch at byte {offset} of message {message} on connection {connection}: {what}"
            return where.format(**self.mismatch)
        return ", ".join(f"{reason} ({times:,} times)" for reason, times in self.failures.items())
