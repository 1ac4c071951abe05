"""Conditions such as ``p99<5ms`` that the result of a load has to meet."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter, ge, gt, le, lt

from ..errors import ConfigError
from .result import LoadResult

UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {"<": lt, "<=": le, ">": gt, ">=": ge}
COUNTS: dict[str, Callable[[LoadResult], float]] = {
    "rate": attrgetter("messages_per_second"),
    "late": attrgetter("late"),
    "lost": attrgetter("lost"),
}
TIME = re.compile(r"min|mean|max|p(?:100|[0-9]{1,2}(?:\.[0-9]+)?)")
SYNTAX = re.compile(r"\s*([a-z0-9.]+)\s*(<=?|>=?)\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[0-9]+)?)\s*([a-zµ]*)\s*")


@dataclass(frozen=True)
class Expectation:
    """A metric of a result, compared with a limit in seconds or messages."""

    text: str
    metric: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Expectation:
        match = SYNTAX.fullmatch(text)
        metric, comparison, number, unit = match.groups() if match else ("", "", "", "")
        if not (unit in UNITS if TIME.fullmatch(metric) else metric in COUNTS and not unit):
            raise ConfigError(
                f"invalid --expect: {text!r} (must be min, mean, max or p0 to p100, then <, <=, > or >=, then a time "
                "in us, ms or s, such as 'p99<5ms'; or a number, such as 'rate>1000', 'late<10' or 'lost<1')"
            )
        return cls(text.strip(), metric, comparison, float(number) * UNITS.get(unit, 1.0))

    def value(self, result: LoadResult) -> float:
        """Return the metric of ``result``, in seconds or messages."""
        if self.metric in COUNTS:
            return COUNTS[self.metric](result)
        if self.metric.startswith("p"):
            return result.latency.percentile(self.metric[1:])
        return float(getattr(result.latency, self.metric))

    def is_met(self, result: LoadResult) -> bool:
        """Compare; without any reply no condition on a time is met."""
        if self.metric not in COUNTS and not result.latency.count:
            return False
        return COMPARISONS[self.comparison](self.value(result), self.limit)

    def format_value(self, result: LoadResult) -> str:
        value = self.value(result)
        return f"{value:g}" if self.metric in COUNTS else f"{1e3 * value:.3f} ms"
