"""Signals of the server: graceful shutdown and certificate reload."""

import asyncio
import signal

from ..errors import StartError
from ..logs import log
from ..server.server import BaseServer
from ..server.systemd import notify

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ServerSignals:
    """The signals of the server: the first stop signal drains it, the next one aborts it, SIGHUP reloads certificates.

    Created in the running event loop, before the server is started.
    """

    def __init__(self) -> None:
        self._server: BaseServer | None = None
        self._stop_requests = 0
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._stop, number)

    def attach(self, server: BaseServer) -> None:
        """Apply the signals to ``server``. It is closed if one arrived before."""
        self._server = server
        if server.config.ssl_certfile is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        if self._stop_requests:
            server.close()

    def ignore(self) -> None:
        """Ignore stop signals, so that none ends the process before it has finished."""
        self.restore()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Restore the default handlers; uvloop does not do this when it is closed."""
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        self._stop_requests += 1
        is_first = self._stop_requests == 1
        event = "shutting down" if is_first else "aborting connections"
        log.info("%s received: %s", signal.Signals(number).name, event)
        notify("STOPPING=1")
        if self._server is not None:
            self._server.close() if is_first else self._server.abort()

    def _reload(self) -> None:
        assert self._server is not None
        try:
            self._server.reload_certificates()
            log.info("SIGHUP received: certificates reloaded")
        except StartError as error:
            log.error("SIGHUP received: reload failed, keeping the previous certificates: %s", error)
