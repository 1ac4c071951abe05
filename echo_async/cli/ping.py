"""One message again and again, like ``ping``: the time of each round trip, and a summary at the end."""

import asyncio
import math
import random
from array import array
from time import perf_counter

from ..client.asyncio_session import AsyncioSession
from ..errors import ConnectError, ReplyError
from .output import Output

MAX_SAMPLES = 100_000  # round-trip times kept for median and p99; of more, a random sample


class RoundTrips:
    """The counters and times of a ping, in bounded memory."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        self._started = perf_counter()
        self._min, self._max, self._sum = math.inf, 0.0, 0.0
        self._samples = array("d")

    @property
    def lost(self) -> int:
        return self.sent - self.received

    def add(self, seconds: float) -> None:
        self.received += 1
        self._sum += seconds
        self._min, self._max = min(self._min, seconds), max(self._max, seconds)
        if len(self._samples) < MAX_SAMPLES:
            self._samples.append(seconds)
        elif (index := random.randrange(self.received)) < MAX_SAMPLES:
            self._samples[index] = seconds

    def summary(self, name: str, *details: str) -> str:
        elapsed = 1e3 * (perf_counter() - self._started)
        percent = 100 * self.lost / self.sent if self.sent else 0.0
        lines = [
            f"--- {name} echo statistics ---",
            f"{self.sent} sent, {self.received} received, {self.lost} lost ({percent:.3g}%), time {elapsed:.0f} ms",
            *details,
        ]
        if self.received:
            times = (self._min, self._sum / self.received, self._quantile(0.5), self._quantile(0.99), self._max)
            milliseconds = "/".join(f"{1e3 * seconds:.3f}" for seconds in times)
            lines.append(f"round trip min/avg/median/p99/max = {milliseconds} ms")
        return "\n".join(lines)

    def _quantile(self, share: float) -> float:
        samples = sorted(self._samples)
        return samples[max(0, math.ceil(share * len(samples)) - 1)]


async def ping(session: AsyncioSession, message: bytes, count: int, interval: float, output: Output) -> bool:
    """Send ``message`` ``count`` times (0: until interrupted), ``interval`` seconds apart, and print the times.

    Return whether all replies matched. :exc:`ConnectError` if the first connection fails; if the server becomes
    unreachable later, the messages sent meanwhile are lost.
    """
    loop, trips = asyncio.get_running_loop(), RoundTrips()
    async with session:
        output.print_heading(f"ECHO {session.name}: {len(message)} bytes")
        next_send = loop.time()
        try:
            while True:
                try:
                    seconds = await session.exchange(message)
                except (ReplyError, ConnectError) as error:
                    output.print_failure(error)
                else:
                    trips.add(seconds)
                    output.print_round_trip(session.name, message, seconds)
                trips.sent += 1
                if trips.sent == count:
                    break
                next_send = max(next_send + interval, loop.time())
                await asyncio.sleep(next_send - loop.time())
        except asyncio.CancelledError:  # Ctrl-C: what was in flight was not lost
            pass
        finally:
            output.print_summary(trips.summary(session.name))
    return not trips.lost
