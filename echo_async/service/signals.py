"""Signals of the server: graceful shutdown and certificate reload."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from ..compat import HANGUP_SIGNALS, STOP_SIGNALS, add_signal_handler, remove_signal_handler
from ..errors import StartError
from ..logs import log
from .systemd import notify

if TYPE_CHECKING:
    from .supervisor import Service

HANDLED_SIGNALS = (*STOP_SIGNALS, *HANGUP_SIGNALS)


class ServerSignals:
    """The signals of the server: the first stop signal drains it, the next one aborts it, SIGHUP reloads certificates.

    SIGHUP is a stop signal if the controlling terminal has hung up, unless the process ignored it (nohup). Created
    in the running event loop, before the server is started.
    """

    def __init__(self) -> None:
        self._server: Service | None = None
        self._stop_requests = 0
        is_hangup_ignored = all(signal.getsignal(number) is signal.SIG_IGN for number in HANGUP_SIGNALS)
        self._stops_on_hangup = not is_hangup_ignored and _has_terminal()
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            add_signal_handler(loop, number, self._stop, number)
        for number in HANGUP_SIGNALS:
            add_signal_handler(loop, number, self._hang_up)

    def attach(self, server: Service) -> None:
        """Apply the signals to ``server``. It is closed if one arrived before."""
        self._server = server
        if self._stop_requests:
            server.close()

    def ignore(self) -> None:
        """Ignore stop signals, so that none ends the process before it has finished."""
        self.restore()
        for number in HANDLED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Restore the default handlers; uvloop does not do this when it is closed."""
        for number in HANDLED_SIGNALS:
            remove_signal_handler(asyncio.get_running_loop(), number)

    def _stop(self, number: int) -> None:
        self._stop_requests += 1
        is_first = self._stop_requests == 1
        event = "shutting down" if is_first else "aborting connections"
        log.info("%s received: %s", signal.Signals(number).name, event)
        notify("STOPPING=1")
        if self._server is not None:
            self._server.close() if is_first else self._server.abort()

    def _hang_up(self) -> None:
        if self._stops_on_hangup and not _has_terminal():
            return self._stop(signal.SIGHUP)
        try:
            is_reloaded = self._server is not None and self._server.reload_certificates()
            log.info("SIGHUP received: %s", "certificates reloaded" if is_reloaded else "nothing to reload")
        except StartError as error:
            log.error("SIGHUP received: reload failed, keeping the previous certificates: %s", error)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal that has not hung up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
