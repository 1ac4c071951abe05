"""What all connections of one server share: options, counters, log settings, the clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..config import ServerConfig
from ..logs import access_log, log
from ..server.counters import Counters
from ..wire.conversation import MODES, Conversation

if TYPE_CHECKING:
    from ..wire.faults import ReportFault

LINGER_TIMEOUT = 5.0  # seconds that input is discarded after the last reply, until the client closes its side
LINGER_TIMEOUT_AT_STOP = 0.5  # the same during a shutdown

ConversationFactory = Callable[[], Conversation]


class ConnectionContext:
    """``log_messages`` and ``log_chunks`` are decided once, so that a disabled log line costs nothing."""

    now = staticmethod(time.monotonic)

    def __init__(self, config: ServerConfig, make_conversation: ConversationFactory | None = None) -> None:
        self.config = config
        self.make_conversation = make_conversation or partial(MODES[config.mode], config.limit_message_size)
        self.counters = Counters()
        self.listener: str | None = None  # the address of the server, as JSON log lines show it
        self.linger_timeout = LINGER_TIMEOUT
        self.log_messages = not config.no_access_log and access_log.isEnabledFor(logging.INFO)
        self.log_chunks = log.isEnabledFor(logging.DEBUG)

    def report_fault(self, peer: str, fault: ReportFault) -> None:
        """Count and log a fault that takes effect on a connection."""
        self.counters.count_fault(fault.kind)
        log.info("%s fault injected: %s", peer, fault.text)

    def fail(self, peer: str, error: Exception) -> None:
        """Count and log an internal error, which ends one connection."""
        self.counters.increment("failed")
        log.error("%s internal error, connection aborted: %r", peer, error)
