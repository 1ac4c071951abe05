"""One message again and again, as ``ping`` does: the time of each round trip, live, and a summary at the end."""

from __future__ import annotations

import asyncio
import math
import random
from array import array
from time import perf_counter

from ..awaitable import AwaitableContextManager
from ..client.client import EchoClient
from ..errors import ConnectError, ReplyError
from .output import Output

__all__ = ["RoundTrips", "ping"]

SAMPLES = 100_000  # round-trip times that are kept for median and p99; of more, a random choice


class RoundTrips:
    """What became of the messages, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        self._started = perf_counter()
        self._least, self._most, self._sum = math.inf, 0.0, 0.0
        self._samples = array("d")

    @property
    def lost(self) -> int:
        return self.sent - self.received

    def add(self, seconds: float) -> None:
        self.received += 1
        self._sum += seconds
        self._least, self._most = min(self._least, seconds), max(self._most, seconds)
        if len(self._samples) < SAMPLES:
            self._samples.append(seconds)
        elif (place := random.randrange(self.received)) < SAMPLES:
            self._samples[place] = seconds

    def summary(self, name: str) -> list[str]:
        took = 1e3 * (perf_counter() - self._started)
        share = 100 * self.lost / self.sent if self.sent else 0.0
        lines = [
            f"--- {name} echo statistics ---",
            f"{self.sent} sent, {self.received} received, {self.lost} lost ({share:.3g}%), time {took:.0f} ms",
        ]
        if self.received:
            figures = (self._least, self._sum / self.received, self._quantile(0.5), self._quantile(0.99), self._most)
            shown = "/".join(f"{1e3 * figure:.3f}" for figure in figures)
            lines.append(f"round trip min/avg/median/p99/max = {shown} ms")
        return lines

    def _quantile(self, share: float) -> float:
        """The time that ``share`` of the round trips did not exceed."""
        samples = sorted(self._samples)
        return samples[max(0, math.ceil(share * len(samples)) - 1)]


async def ping(
    opening: AwaitableContextManager[EchoClient], message: bytes, count: int, interval: float, output: Output
) -> bool:
    """Send ``message`` ``count`` times (0: until interrupted), ``interval`` seconds apart, and show the times.

    Return whether all came back. :exc:`ConnectError` if there was no server to begin with; one that
    goes away later is waited for, and what it misses is lost.
    """
    trips = RoundTrips()
    async with opening as client:
        output.heading(f"ECHO {client.name}: {len(message)} bytes")
        try:
            await _ping(client, message, count, interval, output, trips)
        except asyncio.CancelledError:  # Ctrl-C
            pass
        finally:
            output.summary(trips.summary(client.name))
    return not trips.lost


async def _ping(
    client: EchoClient, message: bytes, count: int, interval: float, output: Output, trips: RoundTrips
) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        try:
            trips.sent += 1
            seconds = await client.exchange(message)
            trips.add(seconds)
            output.round_trip(client.name, message, seconds)
        except (ReplyError, ConnectError) as error:
            output.failure(error)
        except asyncio.CancelledError:
            trips.sent -= 1  # nobody waited for that one to come back
            raise
        if trips.sent == count:
            return
        due = max(due + interval, loop.time())
        await asyncio.sleep(due - loop.time())
