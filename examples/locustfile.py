"""Load on an echo server from many machines: Locust users that talk through echo_async's blocking client.

    pip install locust 'echo-async[uvloop]'
    locust -f examples/locustfile.py --headless --host 127.0.0.1:5500 --users 10 --run-time 30s

With a master and two workers, on one machine or (with ``--master-host``) on several:

    locust -f examples/locustfile.py --headless --host 127.0.0.1:5500 --users 10 --master --expect-workers 2
    locust -f - --worker          # once per worker

Requests have the types ``connect`` and ``echo``. A reply that differs from its message is a failure of the type
``mismatch``. Each user sends ``--echo-rate`` messages per second (0: the next as soon as the reply has arrived).
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Callable

from locust import User, constant_throughput, events, task

from echo_async import EchoError, ReplyDifferent, sync
from echo_async.config import PORT


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--echo-size", type=int, default=1024, help="bytes per message, newline included")
    parser.add_argument("--echo-rate", type=float, default=10.0, help="messages per second and user; 0: no pause")


class EchoUser(User):
    """Send messages one after the other on one connection; reconnect after a failure."""

    client: sync.EchoClient | None = None
    number = 0

    def wait_time(self) -> float:
        rate: float = self.environment.parsed_options.echo_rate
        return constant_throughput(rate)(self) if rate else 0.0

    def on_stop(self) -> None:
        if self.client is not None:
            self.client.close()

    @task
    def echo(self) -> None:
        size: int = self.environment.parsed_options.echo_size
        if self.client is None:
            self._measure("connect", "connect", 0, self._connect)
        if self.client is not None:
            self.number += 1
            message = f"{self.number} ".ljust(size - 1, "x")
            self._measure("echo", f"{size} bytes", size, lambda: self._echo(message))

    def _connect(self) -> None:
        host, _, port = (self.host or "").rpartition(":") if ":" in (self.host or "") else (self.host, "", PORT)
        self.client = sync.connect((host or "127.0.0.1").strip("[]"), int(port))

    def _echo(self, message: str) -> None:
        assert self.client is not None
        self.client.echo(message)

    def _measure(self, kind: str, name: str, size: int, request: Callable[[], None]) -> None:
        """Call ``request`` and report its duration and result to Locust."""
        start, failure = time.perf_counter(), None
        try:
            request()
        except EchoError as error:
            failure = error
            kind = "mismatch" if isinstance(error, ReplyDifferent) else kind
            self._disconnect()
        milliseconds = 1e3 * (time.perf_counter() - start)
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=milliseconds,
            response_length=size,
            exception=failure,
            context={},
        )

    def _disconnect(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None
