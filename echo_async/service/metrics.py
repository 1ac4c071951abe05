"""Prometheus metrics at ``/metrics`` and a health check at ``/healthz``, over HTTP.

A scrape runs in a thread and requests the counters that the server keeps anyway, in the server's event loop. A scrape
therefore includes every message answered before it, by all workers, and a server that does not respond is unhealthy.
Only this module requires prometheus-client (extra ``metrics``).
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from socketserver import BaseServer, ThreadingMixIn
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from .. import net
from ..config import ServerConfig
from ..errors import StartError, describe_error
from ..logs import log
from ..stats import COUNTERS as STATS_COUNTERS
from ..stats import COUNTERS_BY_KIND, Stats
from ..wire.datagrams import REFUSALS
from ..wire.text import escape
from . import Service

T = TypeVar("T")

STATS_TIMEOUT = 3.0  # seconds until the server must respond; longer than the supervisor's for its workers
BACKLOG = 128  # HTTP connections not yet accepted
REQUEST_TIMEOUT = 5.0  # seconds without input until an HTTP request is aborted
MAX_CONNECTIONS = 8  # HTTP connections; a new one closes the oldest. They fit into the reserved descriptors
ACCEPT_RETRY_DELAY = 0.1  # seconds after accept() failed

# Metric name, without prefix and suffix: field of Stats, help text
COUNTERS = {
    "connections_accepted": ("accepted", "Connections established."),
    "connections_refused": ("refused", "Connections refused because the connection limit was reached."),
    "messages": ("messages", "Complete messages answered."),
    "received_bytes": ("bytes_in", "Bytes received from clients."),
    "sent_bytes": ("bytes_out", "Bytes of replies, sent or in the write buffer."),
    "lost": ("lost", "Connections closed with an incomplete message."),
    "too_long": ("too_long", "Connections closed because a message was too long."),
    "tls_failures": ("tls_failures", "Connections closed because the TLS handshake failed."),
    "proxy_failures": (
        "proxy_failures",
        "Connections closed because of an invalid, missing or untrusted PROXY header.",
    ),
    "failures": ("failed", "Connections aborted because of an internal error."),
    "datagrams": ("datagrams", "Datagrams answered."),
}
TIMEOUTS = [name for name in STATS_COUNTERS if name.startswith("timeouts_")]


class StatsCollector(Collector):
    """Converts the counters of the listeners, which ``read`` returns, to metrics, and ``labels`` to the info metric.

    The metrics are sums, and those of each listener as well if the listeners have ``names``.
    """

    def __init__(self, read: Callable[[], Sequence[Stats]], labels: Mapping[str, str], names: Sequence[str]) -> None:
        self._read = read
        self._labels = dict(labels)
        self._names = names
        self._highest: Sequence[Stats] = ()
        self._lock = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        return self._metrics([Stats()] * max(1, len(self._names)))

    def collect(self) -> Iterable[Metric]:
        stats = self._read()
        with self._lock:
            stats = self._highest = list(map(_keep_monotonic, self._highest or [Stats()] * len(stats), stats))
        return self._metrics(stats)

    def _metrics(self, stats: Sequence[Stats]) -> Iterable[Metric]:
        yield InfoMetricFamily("echo_async", "Configuration and version of the server.", self._labels)
        yield from _families("echo_async", [], [([], sum(stats, Stats()))])
        if self._names:
            listeners = [([name], each) for name, each in zip(self._names, stats, strict=True)]
            yield from _families("echo_async_listener", ["listener"], listeners)


def _families(prefix: str, labels: list[str], samples: Sequence[tuple[list[str], Stats]]) -> Iterable[Metric]:
    """Return the metrics of ``samples``, each of which has values for ``labels``."""
    active = GaugeMetricFamily(f"{prefix}_connections_active", "Connections open now.", labels=labels)
    counters = [
        (field, CounterMetricFamily(f"{prefix}_{name}", help, labels=labels))
        for name, (field, help) in COUNTERS.items()
    ]
    kinds = [*labels, "kind"]
    timeouts = CounterMetricFamily(f"{prefix}_timeouts", "Connections closed by a timeout.", labels=kinds)
    faults = CounterMetricFamily(
        f"{prefix}_faults", "Connections and datagrams on which a fault took effect.", labels=kinds
    )
    refused = CounterMetricFamily(
        f"{prefix}_datagrams_refused", "Datagrams that were not answered.", labels=[*labels, "reason"]
    )
    for values, stats in samples:
        active.add_metric(values, stats.active)
        for field, counter in counters:
            counter.add_metric(values, getattr(stats, field))
        for name in TIMEOUTS:
            timeouts.add_metric([*values, name.removeprefix("timeouts_")], getattr(stats, name))
        for kind, count in stats.faults.items():
            faults.add_metric([*values, kind], count)
        for reason in REFUSALS:
            refused.add_metric([*values, reason], stats.datagrams_refused.get(reason, 0))
    return [active, *(counter for _, counter in counters), refused, timeouts, faults]


def _keep_monotonic(previous: Stats, current: Stats) -> Stats:
    """Never lower a counter: the fields are read while threads change them, and a decrease means a restart."""
    counts = {name: max(getattr(previous, name), getattr(current, name)) for name in STATS_COUNTERS}
    maps: dict[str, Any] = {
        name: _highest(getattr(previous, name), getattr(current, name)) for name in COUNTERS_BY_KIND
    }
    return Stats(**{**counts, "active": current.active}, **maps)


def _highest(previous: Mapping[str, int], current: Mapping[str, int]) -> dict[str, int]:
    return {**current, **{kind: max(count, current.get(kind, 0)) for kind, count in previous.items()}}


class MetricsServer:
    """An HTTP server that listens from its creation and answers requests from :meth:`start` to :meth:`close`.

    It listens on every address of the name ``address``. :exc:`~echo_async.StartError` if it cannot.
    """

    def __init__(self, address: str, port: int) -> None:
        config = ServerConfig(host=address, port=port, backlog=BACKLOG)
        try:
            self._https = [_HttpServer(each) for each in net.bind(config, net.resolve(config))]
        except StartError as error:
            reason = describe_error(error.__cause__) if isinstance(error.__cause__, Exception) else error
            raise StartError(
                f"cannot serve metrics on {net.format_address((escape(address), port))}: {reason}; "
                "choose another --metrics-port or --metrics-address"
            ) from error
        self._threads: list[threading.Thread] = []

    def start(self, server: Service, labels: Mapping[str, str], names: Sequence[str]) -> None:
        """Serve the metrics of ``server``, which uses the running event loop, and of its listeners by ``names``.

        :exc:`~echo_async.StartError` for lack of threads.
        """
        loop = asyncio.get_running_loop()
        registry = CollectorRegistry()
        registry.register(StatsCollector(lambda: _run_in_loop(loop, server.fetch_stats()), labels, names))
        application = _application(make_wsgi_app(registry), lambda: _run_in_loop(loop, server.is_healthy()))
        for http in self._https:
            http.set_app(application)
            thread = threading.Thread(target=http.serve_forever, name="echo-async metrics", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise StartError(f"cannot serve metrics: {describe_error(error)}; raise the thread limit") from error
            self._threads.append(thread)
            log.info("metrics available at http://%s/metrics", net.format_address(http.server_address))

    def close(self) -> None:
        for http, thread in zip(self._https, self._threads, strict=False):  # none, or some, were started
            with contextlib.suppress(OSError):
                http.socket.shutdown(socket.SHUT_RDWR)  # otherwise shutdown takes up to 0.5 s
            http.shutdown()
            thread.join()
        for http in self._https:
            http.server_close()


def _run_in_loop(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` in the ``loop`` of another thread. :exc:`TimeoutError` if the loop is blocked or closed."""
    try:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:  # the loop is closed
        coroutine.close()
        raise TimeoutError from None
    try:
        return future.result(STATS_TIMEOUT)
    except CancelledError:  # the loop is about to be closed
        raise TimeoutError from None
    finally:
        future.cancel()


def _application(metrics: Callable[..., Any], is_healthy: Callable[[], bool]) -> Callable[..., Iterable[bytes]]:
    """Return the WSGI application that routes requests to ``metrics`` and the health check."""

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method, headers = environ["REQUEST_METHOD"], [("Content-Type", "text/plain; charset=utf-8")]
        try:
            match environ["PATH_INFO"]:
                case "/metrics" | "/healthz" if method not in METHODS:
                    status, body = "405 Method Not Allowed", b"method not allowed; use GET or HEAD\n"
                    headers.append(("Allow", ", ".join(METHODS)))
                case "/metrics":
                    started: list[Any] = []
                    response = metrics({**environ, "REQUEST_METHOD": "GET"}, lambda *start: started.extend(start))
                    body = b"".join(response)
                    status, headers = started
                case "/healthz" if is_healthy():
                    status, body = "200 OK", b"serving\n"
                case "/healthz":
                    status, body = "503 Service Unavailable", b"not serving\n"
                case _:
                    status, body = "404 Not Found", b"not found; use /metrics or /healthz\n"
        except TimeoutError:
            status, body = "503 Service Unavailable", b"server is not responding\n"
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if method == "HEAD" else [body]

    return application


METHODS = ("GET", "HEAD")


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT

    def log_message(self, *args: object) -> None:
        """Do not log requests."""


class _HttpServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a slow HTTP client does not delay the shutdown

    def __init__(self, listener: socket.socket) -> None:
        self._connections: dict[socket.socket, None] = {}  # in the order of their arrival
        self._lock = threading.Lock()
        BaseServer.__init__(self, listener.getsockname(), _Handler)  # that of TCPServer opens a socket
        self.socket = listener
        self.server_name, self.server_port = listener.getsockname()[:2]
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection. After an error, which the base class ignores, pause instead of a busy loop."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(ACCEPT_RETRY_DELAY)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread. Beyond the limit, close the oldest: idle connections block no scrape."""
        with self._lock:
            self._connections[request] = None
            oldest = next(iter(self._connections)) if len(self._connections) > MAX_CONNECTIONS else None
            if oldest is not None:
                del self._connections[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, *args: object) -> None:
        """Do not log lost or timed out HTTP connections."""
