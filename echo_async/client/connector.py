"""Where to connect, and how: names resolved, addresses raced, time and TLS kept, every failure told in one line."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, TypeVar

from ..config import check_seconds
from ..errors import ConfigError, ConnectError, ConnectTimeout, describe_error

__all__ = ["Connector"]

P = TypeVar("P", bound=asyncio.Protocol)

AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]

CONNECTION_ATTEMPT_DELAY = 0.25  # seconds that an address gets before the next is tried as well (RFC 8305)
MIN_RETRY_DELAY, MAX_RETRY_DELAY = 0.02, 0.5  # seconds between attempts, doubled each time
UNIX_RETRY_DELAY = 0.005  # seconds until a Unix socket with a full queue is asked again
TLS_SHUTDOWN_TIMEOUT = 2.0  # seconds for the server to answer our end of TLS

log = logging.getLogger("echo_async.client")


class Connector:
    """A server's address, and what a connection to it takes. ``name`` is how errors call it."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        uds: str | os.PathLike[str] | None,
        connect_timeout: float,
        retry: float,
        ssl: ssl.SSLContext | bool | None,
        server_hostname: str | None,
    ) -> None:
        check_seconds("connect_timeout", connect_timeout)
        if not isinstance(retry, int | float) or not 0 <= retry < math.inf:
            raise ConfigError(f"retry {retry!r} makes no sense: give seconds, 0 or more")
        if uds is None:
            _check_address(host, port)
            self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        else:
            self.name = os.fspath(uds)
            if not self.name or "\0" in self.name[1:]:
                raise ConfigError(f"uds {self.name!r} is no path: give the path of a Unix socket")
        if server_hostname is not None and not ssl:
            raise ConfigError("server_hostname is for TLS: give ssl as well")
        self.host, self.port, self.uds = host, port, None if uds is None else os.fspath(uds)
        self.connect_timeout, self.retry = connect_timeout, retry
        self.tls: dict[str, Any] = {} if not ssl else _tls_arguments(ssl, server_hostname or _host_name(host, uds))
        self.numeric = _numeric(host, port) if uds is None else None

    async def open(self, factory: Callable[[], P]) -> P:
        """Connect, again and again for ``retry`` seconds if need be; return the protocol made by ``factory``."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self.retry
        pause = MIN_RETRY_DELAY
        seconds = self.connect_timeout
        while True:
            try:
                return await self._attempt(factory, seconds)
            except ConnectError as error:
                left = give_up - loop.time()
                if left <= 0 or isinstance(error.__cause__, ssl.SSLCertVerificationError):
                    raise
                log.debug("%s; trying again", error)
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, MAX_RETRY_DELAY)
            seconds = min(self.connect_timeout, max(give_up - loop.time(), MIN_RETRY_DELAY))

    async def _attempt(self, factory: Callable[[], P], seconds: float) -> P:
        started = perf_counter()
        log.debug("connecting to %s", self.name)
        try:
            async with asyncio.timeout(seconds):
                connected = await self._connect()
                log.debug("connected to %s in %.3f ms", self.name, 1e3 * (perf_counter() - started))
                return await self._carry(connected, factory)
        except TimeoutError as error:
            within = f": {describe_error(error)}" if error.errno else f" within {seconds:g} s"
            raise ConnectTimeout(f"cannot connect to {self.name}{within}; is it the right address?") from error
        except ssl.SSLError as error:
            raise ConnectError(f"cannot connect to {self.name}: TLS: {describe_error(error)}") from error
        except (OSError, UnicodeError) as error:
            raise ConnectError(f"cannot connect to {self.name}: {describe_error(error)}{advice(error)}") from error

    async def _carry(self, connected: socket.socket, factory: Callable[[], P]) -> P:
        """Hand the connected socket to the event loop, with TLS where it is asked for."""
        loop = asyncio.get_running_loop()
        started = perf_counter()
        # From here the transport owns the socket, and closes it also when this is cancelled.
        create = loop.create_connection if self.uds is None else loop.create_unix_connection
        transport, protocol = await create(factory, sock=connected, **self.tls)
        if self.tls and log.isEnabledFor(logging.DEBUG):
            tls = transport.get_extra_info("ssl_object")
            seconds = perf_counter() - started
            log.debug("%s in %.3f ms (%s)", tls.version(), 1e3 * seconds, tls.cipher()[0])
        return protocol

    async def _connect(self) -> socket.socket:
        if self.uds is not None:
            return await _connect_unix(self.uds)
        infos = self.numeric or await self._resolve()
        if len(infos) == 1:
            return await _connect_to(infos[0])
        return await _race(infos)

    async def _resolve(self) -> Sequence[AddressInfo]:
        return list(dict.fromkeys(await _getaddrinfo(self.host, self.port)))


def _check_address(host: str, port: int) -> None:
    if not isinstance(host, str):
        raise ConfigError(f"host {host!r} makes no sense: give a name or an address, as text")
    if not host:
        raise ConfigError("host is empty: give a name or an address")
    if "\0" in host:
        raise ConfigError(f"host {host!r} makes no sense: give a name or an address")
    if not isinstance(port, int) or not 1 <= port <= 65535:
        raise ConfigError(f"port {port!r} is out of range: give a whole number from 1 to 65535")


def _host_name(host: str, uds: object) -> str:
    return host.partition("%")[0] if uds is None else "localhost"


def _tls_arguments(context: ssl.SSLContext | bool, server_hostname: str) -> dict[str, Any]:
    return {
        "ssl": ssl.create_default_context() if context is True else context,
        "server_hostname": server_hostname,
        "ssl_shutdown_timeout": TLS_SHUTDOWN_TIMEOUT,
    }


def _numeric(host: str, port: int) -> Sequence[AddressInfo] | None:
    """The address that ``host`` is already, so that no resolver need be asked; None if it is a name."""
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None


async def _getaddrinfo(host: str, port: int) -> Sequence[AddressInfo]:
    """Ask the resolver, in a thread of our own: an event loop waits at its end for those that it started itself."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[AddressInfo]] = loop.create_future()

    def tell(infos: Sequence[AddressInfo], error: Exception | None) -> None:
        if answer.done():  # cancelled, or out of time
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(infos)

    def ask() -> None:
        infos: Sequence[AddressInfo] = []
        failure: Exception | None = None
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, infos, failure)

    threading.Thread(target=ask, name=f"resolve {host}", daemon=True).start()
    return await answer


async def _connect_to(info: AddressInfo) -> socket.socket:
    family, kind, number, _, address = info
    connecting = socket.socket(family, kind, number)
    try:
        connecting.setblocking(False)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connecting, address)
    except BaseException:
        connecting.close()
        raise
    return connecting


async def _race(infos: Sequence[AddressInfo]) -> socket.socket:
    """The first address that answers: each gets a head start, or goes as soon as the one before has failed."""
    running: set[asyncio.Task[socket.socket]] = set()
    failure: BaseException | None = None
    waiting = list(infos)
    try:
        while running or waiting:
            if waiting:
                running.add(asyncio.create_task(_connect_to(waiting.pop(0))))
            head_start = CONNECTION_ATTEMPT_DELAY if waiting else None
            done, running = await asyncio.wait(running, timeout=head_start, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None:
                    done.remove(task)
                    running |= done
                    return task.result()
                failure = failure or task.exception()
    finally:
        for task in running:
            task.cancel()
        for result in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(result, socket.socket):
                result.close()
    assert failure is not None
    raise failure


async def _connect_unix(path: str) -> socket.socket:
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        while True:
            # A Unix socket connects at once, or never: EAGAIN is a full queue, not a connection on its way.
            with contextlib.suppress(BlockingIOError):
                connecting.connect(path)
                return connecting
            await asyncio.sleep(UNIX_RETRY_DELAY)
    except BaseException:
        connecting.close()
        raise


_ADVICE = {
    errno.ECONNREFUSED: "; is the server running there?",
    errno.ENOENT: "; is the server running there?",
    errno.ECONNRESET: "; does it speak TLS as you do?",
}


def advice(error: OSError | UnicodeError) -> str:
    if isinstance(error, socket.gaierror | UnicodeError):
        return "; check the host"
    return _ADVICE.get(error.errno or 0, "")
