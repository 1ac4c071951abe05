"""``p99<5ms``: what a load has to hold to, for CI."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .load import LoadResult

__all__ = ["Expectation"]

UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
COUNTS: dict[str, Callable[[LoadResult], float]] = {
    "rate": lambda result: result.messages_per_second,
    "late": lambda result: result.late,
    "lost": lambda result: result.lost,
}
TIME = re.compile(r"min|mean|max|p(?:100|[0-9]{1,2}(?:\.[0-9]+)?)")
SHAPE = re.compile(r"\s*([a-z0-9.]+)\s*(<=?|>=?)\s*([0-9.]+(?:e[0-9]+)?)\s*([a-zµ]*)\s*")


@dataclass(frozen=True)
class Expectation:
    """A figure of the result, compared with a number."""

    text: str
    name: str
    comparison: str
    limit: float
    """In seconds, or a number."""

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """:exc:`~echo_async.ConfigError` if it makes no sense."""
        shape = SHAPE.fullmatch(text)
        name, comparison, number, unit = shape.groups() if shape else ("", "", "", "")
        is_time = TIME.fullmatch(name) is not None
        known = unit in UNITS if is_time else name in COUNTS and not unit
        try:
            limit = float(number)
        except ValueError:
            known = False
        if not known:
            raise ConfigError(
                f"expect {text!r} makes no sense: give min, mean, max or p0 to p100, <, <=, > or >=, and a time "
                "in us, ms or s, as in 'p99<5ms'; or a number of messages, as in 'rate>1000', 'late<10' or 'lost<1'"
            )
        return cls(text.strip(), name, comparison, limit * UNITS.get(unit, 1.0))

    def value(self, result: LoadResult) -> float:
        """What ``result`` has for it, in seconds or as a number."""
        if self.name in COUNTS:
            return COUNTS[self.name](result)
        if self.name.startswith("p"):
            return result.times.percentile(self.name[1:])
        return float(getattr(result.times, self.name))

    def holds(self, result: LoadResult) -> bool:
        """Whether it does; nothing holds for the times of no message."""
        if self.name not in COUNTS and not result.times.count:
            return False
        return COMPARISONS[self.comparison](self.value(result), self.limit)

    def shown(self, result: LoadResult) -> str:
        """``p99<5ms``, and what it is."""
        value = self.value(result)
        return f"{value:g}" if self.name in COUNTS else f"{1e3 * value:.3f} ms"
