"""What a check ends with."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one check.

    ``expected`` is what a path that passes does; ``seen`` is empty if it was skipped. The ``reason`` is the behavior
    that usually explains a failure, or why it was skipped; None if it passed.
    """

    check: str
    result: Outcome
    expected: str
    seen: str
    reason: str | None
    seconds: float


class Failure(Exception):
    """A check failed: what was seen, and which behavior explains it."""

    def __init__(self, seen: str, reason: str) -> None:
        super().__init__(seen, reason)
        self.seen, self.reason = seen, reason


class Skip(Exception):
    """A check does not apply, for this reason."""
