"""What Prometheus reads: a server's counters at ``/metrics``, and at ``/healthz`` whether it serves.

Nothing is counted for this: a scrape asks the server, in its event loop, for the counters that it keeps in any case.
So what a client has been answered is in the next scrape, over all workers; and a server that does not answer any more
is not well. Served over HTTP from threads of its own. This file alone needs prometheus-client, the extra ``metrics``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import CancelledError
from dataclasses import fields
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Self, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ..errors import StartError, describe_error
from ..logs import log
from ..net import format_address
from ..stats import Stats
from .server import BaseServer

__all__ = ["MetricsServer", "StatsCollector"]

T = TypeVar("T")

STATS_TIMEOUT = 3.0  # seconds for the server to answer; its workers have less
REQUEST_TIMEOUT = 5.0  # seconds in which a client of this port has to go on with its request

COUNTERS = {
    "connections_accepted": ("accepted", "Connections that were let in."),
    "connections_refused": ("refused", "Connections closed at once, because the limit of connections was reached."),
    "messages": ("messages", "Complete messages that were answered."),
    "received_bytes": ("bytes_in", "Bytes received from clients."),
    "sent_bytes": ("bytes_out", "Bytes of replies, delivered or on their way."),
    "lost": ("lost", "Connections that ended in mid-message."),
    "too_long": ("too_long", "Connections closed for a message over the limit."),
    "tls_failures": ("tls_failures", "Connections that failed in the TLS handshake."),
    "proxy_failures": ("proxy_failures", "Connections closed for a PROXY header that was bad, missing or not allowed."),
    "failures": ("failed", "Connections closed for an error of the server's own."),
}
TIMEOUTS = [field.name for field in fields(Stats) if field.name.startswith("timeouts_")]


class StatsCollector(Collector):
    """The metrics that ``read`` gives the numbers of, and ``facts`` as labels of one that is always 1."""

    def __init__(self, read: Callable[[], Stats], facts: Mapping[str, str]) -> None:
        self._read = read
        self._facts = dict(facts)
        self._highest = Stats()
        self._lock = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        """What there is, without asking the server."""
        return self._metrics(Stats())

    def collect(self) -> Iterable[Metric]:
        """What there is now."""
        stats = self._read()
        with self._lock:
            stats = self._highest = _keep_monotonic(self._highest, stats)
        return self._metrics(stats)

    def _metrics(self, stats: Stats) -> Iterable[Metric]:
        yield InfoMetricFamily("echo_async", "The server.", self._facts)
        yield GaugeMetricFamily("echo_async_connections_active", "Connections that are open now.", stats.active)
        for name, (field, help) in COUNTERS.items():
            yield CounterMetricFamily(f"echo_async_{name}", help, getattr(stats, field))
        timeouts = CounterMetricFamily("echo_async_timeouts", "Connections closed by a time-out.", labels=["kind"])
        for name in TIMEOUTS:
            timeouts.add_metric([name.removeprefix("timeouts_")], getattr(stats, name))
        yield timeouts


def _keep_monotonic(before: Stats, now: Stats) -> Stats:
    """A client's own counters are read while its thread goes on: one may seem to go down, which means a restart."""
    counts = {field.name: max(getattr(before, field.name), getattr(now, field.name)) for field in fields(Stats)}
    return Stats(**{**counts, "active": now.active})


class MetricsServer:
    """Listens on ``address`` and ``port`` as soon as it is made, answers from :meth:`start` until it is closed.

    :exc:`~echo_async.StartError` if it cannot listen there.
    """

    def __init__(self, address: str, port: int) -> None:
        try:
            family, _, _, _, target = socket.getaddrinfo(
                address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._http = _HttpServer(family, target)
        except (OSError, ValueError) as error:
            raise StartError(
                f"cannot serve metrics on {format_address((address, port))}: {describe_error(error)}; "
                "give another --metrics-port or --metrics-address"
            ) from error
        self._thread = threading.Thread(target=self._http.serve_forever, name="echo-async metrics")

    @property
    def url(self) -> str:
        """Where the metrics are."""
        return f"http://{format_address(self._http.server_address)}/metrics"

    def start(self, server: BaseServer, facts: Mapping[str, str]) -> None:
        """Answer for ``server``, which runs in the running event loop."""
        loop = asyncio.get_running_loop()
        registry = CollectorRegistry()
        registry.register(StatsCollector(lambda: _run_in_loop(loop, server.fetch_stats()), facts))
        self._http.set_app(_application(make_wsgi_app(registry), lambda: _run_in_loop(loop, server.is_healthy())))
        self._thread.start()
        log.info("metrics at %s", self.url)

    def close(self) -> None:
        """Answer no more."""
        if self._thread.is_alive():
            with contextlib.suppress(OSError):
                self._http.socket.shutdown(socket.SHUT_RDWR)  # or its thread would notice half a second later
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _run_in_loop(loop: asyncio.AbstractEventLoop, question: Coroutine[Any, Any, T]) -> T:
    """What ``question`` gives in ``loop``, for another thread. :exc:`TimeoutError` if the loop is stuck or gone."""
    try:
        answer = asyncio.run_coroutine_threadsafe(question, loop)
    except RuntimeError:  # closed just now
        question.close()
        raise TimeoutError from None
    try:
        return answer.result(STATS_TIMEOUT)
    except CancelledError:  # the loop ends
        raise TimeoutError from None
    finally:
        answer.cancel()


def _application(metrics: Callable[..., Any], is_healthy: Callable[[], bool]) -> Callable[..., Iterable[bytes]]:
    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            match environ["PATH_INFO"]:
                case "/metrics":
                    answer: Iterable[bytes] = metrics(environ, start_response)
                    return answer
                case "/healthz" if is_healthy():
                    status, text = "200 OK", b"serving\n"
                case "/healthz":
                    status, text = "503 Service Unavailable", b"not serving\n"
                case _:
                    status, text = "404 Not Found", b"there are /metrics and /healthz\n"
        except TimeoutError:
            status, text = "503 Service Unavailable", b"the server does not answer\n"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))])
        return [text]

    return application


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT

    def log_message(self, *args: object) -> None:
        """A scrape is not worth a line."""


class _HttpServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # who is slow to ask does not hold up the end of the server

    def __init__(self, family: socket.AddressFamily, address: Any) -> None:
        self.address_family = family
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without asking a resolver for the name of this machine, as the base class does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, *args: object) -> None:
        """A client that broke off, or was too slow."""
