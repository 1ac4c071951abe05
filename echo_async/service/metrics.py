"""Prometheus metrics at ``/metrics`` and a health check at ``/healthz``, over HTTP, in the server's event loop.

A scrape requests the counters that the server keeps anyway, from all workers. It therefore includes every message
answered before it. Only this module requires prometheus-client (extra ``metrics``).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from email.utils import formatdate
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from .. import net
from ..config import ServerConfig
from ..engines.loop_internals import ACCEPT_BATCH, TRANSPORT_ERRORS, start_serving
from ..errors import StartError, describe_error
from ..logs import log
from ..stats import COUNTERS as STATS_COUNTERS
from ..stats import ENDS, Stats, combine
from ..wire.datagrams import REFUSALS
from ..wire.text import escape

if TYPE_CHECKING:
    from .supervisor import Service

BACKLOG = 128  # HTTP connections not yet accepted
REQUEST_TIMEOUT = 5.0  # seconds from accepting an HTTP connection until the response is sent
MAX_CONNECTIONS = 8  # HTTP connections. They fit into the reserved descriptors
MAX_LINE, MAX_HEADERS = 8192, 100  # bytes of the request line, or of a header; number of headers
METHODS = ("GET", "HEAD")

Response = tuple[str, Sequence[tuple[str, str]], bytes]
"""Status, headers and body."""

# Metric name, without prefix and suffix: field of Stats, help text
COUNTERS = {
    "connections_accepted": ("accepted", "Connections established."),
    "connections_refused": ("refused", "Connections refused because the connection limit was reached."),
    "messages": ("messages", "Complete messages answered."),
    "received_bytes": ("bytes_in", "Bytes received from clients."),
    "sent_bytes": ("bytes_out", "Bytes of replies, sent or in the write buffer."),
    "lost": ("lost", "Connections closed with an incomplete message."),
    "too_long": ("too_long", "Connections closed because a message was too long."),
    "tls_failures": ("tls_failures", "Connections closed because of an error of TLS."),
    "proxy_failures": (
        "proxy_failures",
        "Connections closed because of an invalid, missing or untrusted PROXY header.",
    ),
    "failures": ("failed", "Connections aborted because of an internal error."),
    "datagrams": ("datagrams", "Datagrams answered."),
}
# Those that have a number per kind: the label, help text
COUNTERS_BY_KIND = {
    "datagrams_refused": ("reason", "Datagrams that were not answered."),
    "timeouts": ("kind", "Connections closed by a timeout."),
    "faults": ("kind", "Connections and datagrams on which a fault took effect."),
    "connections_ended": ("reason", "Accepted connections that are not open anymore; each has one reason."),
}
TIMEOUTS = [name for name in STATS_COUNTERS if name.startswith("timeouts_")]


class ServiceCollector(Collector):
    """Converts what a service counts to metrics: of its listeners, which ``read`` returns, and besides these.

    The metrics of listeners are sums, and those of each as well if they have ``names``. ``labels`` are of the info
    metric.
    """

    def __init__(
        self, service: Service, read: Callable[[], Sequence[Stats]], labels: Mapping[str, str], names: Sequence[str]
    ) -> None:
        self._service = service
        self._read = read
        self._labels = dict(labels)
        self._names = names
        self._highest: Sequence[Stats] = ()

    def collect(self) -> Iterable[Metric]:
        stats = self._read()
        stats = self._highest = list(map(_keep_monotonic, self._highest or [Stats()] * len(stats), stats))
        yield InfoMetricFamily("echo_async", "Configuration and version of the server.", self._labels)
        yield from _families("echo_async", [], [([], sum(stats, Stats()))])
        if self._names:
            listeners = [([name], each) for name, each in zip(self._names, stats, strict=True)]
            yield from _families("echo_async_listener", ["listener"], listeners)
        restarts = self._service.worker_restarts
        yield CounterMetricFamily("echo_async_worker_restarts", "Workers that exited and were replaced.", restarts)
        certificates = self._service.certificates
        reloads = CounterMetricFamily(
            "echo_async_certificate_reloads", "Certificates that were reloaded on SIGHUP.", labels=["result"]
        )
        for result in ("success", "failure"):
            reloads.add_metric([result], sum(each.reloads[result] for each in certificates))
        yield reloads
        if certificates:
            yield GaugeMetricFamily(
                "echo_async_certificate_expiry_timestamp_seconds",
                "Time at which the first of the certificates expires, in seconds since the epoch.",
                min(each.expires_at for each in certificates),
            )


def _families(prefix: str, labels: list[str], samples: Sequence[tuple[list[str], Stats]]) -> Iterable[Metric]:
    """Return the metrics of ``samples``, each of which has values for ``labels``."""
    active = GaugeMetricFamily(f"{prefix}_connections_active", "Connections open now.", labels=labels)
    counters = [
        (field, CounterMetricFamily(f"{prefix}_{name}", help, labels=labels))
        for name, (field, help) in COUNTERS.items()
    ]
    by_kind = {
        name: CounterMetricFamily(f"{prefix}_{name}", help, labels=[*labels, label])
        for name, (label, help) in COUNTERS_BY_KIND.items()
    }
    for values, stats in samples:
        active.add_metric(values, stats.active)
        for field, counter in counters:
            counter.add_metric(values, getattr(stats, field))
        counts = {
            "datagrams_refused": {**dict.fromkeys(REFUSALS, 0), **stats.datagrams_refused},
            "timeouts": {name.removeprefix("timeouts_"): getattr(stats, name) for name in TIMEOUTS},
            "faults": stats.faults,
            "connections_ended": {**dict.fromkeys(ENDS, 0), **stats.ended},
        }
        for name, counter in by_kind.items():
            for kind, count in counts[name].items():
                counter.add_metric([*values, kind], count)
    return [active, *(counter for _, counter in counters), *by_kind.values()]


def _keep_monotonic(previous: Stats, current: Stats) -> Stats:
    """Never lower a counter: the fields are read while threads change them, and a decrease means a restart."""
    return replace(combine(previous, current, max), active=current.active)


class MetricsServer:
    """An HTTP server that listens from its creation and answers requests from :meth:`start` to :meth:`close`.

    It listens on every address of the name ``address``. :exc:`~echo_async.StartError` if it cannot.
    """

    def __init__(self, address: str, port: int) -> None:
        config = ServerConfig(host=address, port=port, backlog=BACKLOG)
        try:
            self._sockets = net.bind(config, net.resolve(config))
        except StartError as error:
            reason = describe_error(error.__cause__) if isinstance(error.__cause__, Exception) else error
            raise StartError(
                f"cannot serve metrics on {net.format_address((escape(address), port))}: {reason}; "
                "choose another --metrics-port or --metrics-address"
            ) from error
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: dict[asyncio.StreamWriter, bool] = {}  # in the order of their arrival; whether idle

    async def start(self, service: Service, labels: Mapping[str, str], names: Sequence[str]) -> None:
        """Serve the metrics of ``service``, and of its listeners by ``names``, in the running event loop."""
        self._service = service
        self._stats = [Stats() for _ in service.listener_names]
        registry = CollectorRegistry(auto_describe=True)
        registry.register(ServiceCollector(service, lambda: self._stats, labels, names))
        self._metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)
        for each in self._sockets:
            try:
                server = await asyncio.start_server(
                    self._accept, sock=each, backlog=ACCEPT_BATCH, limit=MAX_LINE, start_serving=False
                )
                self._servers.append(await start_serving(server, each, BACKLOG))
            except (OSError, NotImplementedError) as error:
                raise StartError(f"cannot serve metrics: {describe_error(error)}; use another --loop") from error
            log.info("metrics available at http://%s/metrics", net.format_address(each.getsockname()))

    def close(self) -> None:
        """Stop listening and end all requests. The event loop may run no more, but is not closed."""
        for server in self._servers:
            server.close()
        for each in self._sockets:
            each.close()
        for task in self._tasks:
            task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection. Beyond the limit, abort the one that is idle for longest: they block no scrape."""
        self._connections[writer] = True
        if len(self._connections) > MAX_CONNECTIONS:
            oldest = next(each for each, is_idle in self._connections.items() if is_idle)
            del self._connections[oldest]
            oldest.transport.abort()
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(*TRANSPORT_ERRORS, EOFError):  # lost, timed out, or ended within the request
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    try:
                        request = await _read_request(reader)
                    except (ValueError, asyncio.LimitOverrunError):
                        request = {}
                    self._connections[writer] = False
                    try:
                        response = await self._respond(request)
                    except Exception as error:
                        report = {"message": "metrics request failed", "exception": error}
                        asyncio.get_running_loop().call_exception_handler(report)
                        response = _text("500 Internal Server Error", "internal error")
                    writer.write(_encode(*response, has_body=request.get("REQUEST_METHOD") != "HEAD"))
                    writer.close()
                    await writer.wait_closed()
        finally:
            self._connections.pop(writer, None)
            writer.transport.abort()

    async def _respond(self, request: dict[str, str]) -> Response:
        match request.get("PATH_INFO"):
            case None:
                return _text("400 Bad Request", "invalid request")
            case "/metrics" | "/healthz" if request["REQUEST_METHOD"] not in METHODS:
                allowed = ("Allow", ", ".join(METHODS))
                return _text("405 Method Not Allowed", "method not allowed; use GET or HEAD", allowed)
            case "/metrics":
                self._stats = await self._service.fetch_stats()
                return self._expose({**request, "REQUEST_METHOD": "GET"})
            case "/healthz" if await self._service.is_healthy():
                return _text("200 OK", "serving")
            case "/healthz":
                return _text("503 Service Unavailable", "not serving")
        return _text("404 Not Found", "not found; use /metrics or /healthz")

    def _expose(self, request: dict[str, str]) -> Response:
        """Return the metrics in the format that ``request`` accepts; in the default one if its header is invalid."""
        start: list[Any] = []
        try:
            body = self._metrics(request, lambda *values: start.extend(values))
        except (TypeError, ValueError):  # prometheus_client/exposition.py, choose_encoder: a version that is no number
            body = self._metrics({**request, "HTTP_ACCEPT": ""}, lambda *values: start.extend(values))
        status, headers = start
        return status, headers, b"".join(body)


async def _read_request(reader: asyncio.StreamReader) -> dict[str, str]:
    """Read a request without a body (RFC 9112); return it as a WSGI environment (PEP 3333)."""
    method, target, _ = (await _read_line(reader)).split(" ")
    url = urlsplit(target)
    request = {"REQUEST_METHOD": method, "PATH_INFO": url.path, "QUERY_STRING": url.query}
    for _ in range(MAX_HEADERS + 1):
        line = await _read_line(reader)
        if not line:
            return request
        name, _, value = line.partition(":")
        request[f"HTTP_{name.upper().replace('-', '_')}"] = value.strip()
    raise ValueError("too many headers")


async def _read_line(reader: asyncio.StreamReader) -> str:
    return (await reader.readuntil(b"\n")).decode("latin-1").rstrip("\r\n")


def _text(status: str, text: str, *headers: tuple[str, str]) -> Response:
    return status, [("Content-Type", "text/plain; charset=utf-8"), *headers], f"{text}\n".encode()


def _encode(status: str, headers: Sequence[tuple[str, str]], body: bytes, *, has_body: bool) -> bytes:
    headers = [("Date", formatdate(usegmt=True)), *headers, ("Content-Length", str(len(body)))]
    lines = [f"HTTP/1.0 {status}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (body if has_body else b"")
