"""Exact percentiles of measured times, by the nearest rank: each one is a sample."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PERCENTILES = ("50", "90", "99", "99.9")


class Distribution:
    """Times in seconds, each with the number of messages that took it. ``count`` is the number of all messages."""

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
