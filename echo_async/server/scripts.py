"""Which connections of a server have a script: faults, and the replies in ``identify`` mode, with their facts."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from ..config import ServerConfig
from ..engines.connection import Connection
from ..engines.context import Slot
from ..logs import log
from ..net import format_address, get_host
from ..wire.faults import REFUSE, FaultPlan, FaultSchedule, FaultScript
from ..wire.identity import Address, Describer, IdentifyScript, Kubernetes, Proxy, Responder, Tls
from ..wire.proxy import ProxyHeader
from ..wire.script import EchoScript, Report, Script


class Scripts:
    """Used by one thread at a time.

    The last of ``schedules`` decides which of the next connections have a fault. With ``wrap``, each connection has a
    script: what it makes of the one that replies as the mode demands.
    """

    def __init__(self, config: ServerConfig, wrap: Callable[[Connection, Script], Script] | None = None) -> None:
        self._config = config
        self._wrap = wrap
        self._is_raw = config.mode == "raw"
        self.schedules: list[FaultSchedule] = []
        if config.has_faults:
            schedule = FaultSchedule(config.fault, config.fault_sequence, config.fault_seed)
            self.schedules.append(schedule)
            log.info("faults configured: %s, seed %d", config.fault or config.fault_sequence, schedule.seed)

    def assign(self, slot: Slot) -> Report | None:
        """Give the next connection its script, if it has one; return the report if it is to be reset instead."""
        plan = self.schedules[-1].next_plan() if self.schedules else None
        if plan is not None and plan.fault.end == REFUSE:
            return plan.fault.report(REFUSE)
        if plan is not None or self._wrap is not None or self._config.mode == "identify":
            slot.make_script = partial(self._make_script, plan)
        return None

    def datagram_schedule(self) -> FaultSchedule | None:
        """Return a schedule with the same faults for datagrams, which are numbered apart; None if there are none."""
        if not self.schedules:
            return None
        return FaultSchedule(self._config.fault, self._config.fault_sequence, self.schedules[0].seed)

    def _make_script(self, plan: FaultPlan | None, connection: Connection) -> Script:
        script = self._make_replies(connection)
        if self._wrap is not None:
            script = self._wrap(connection, script)
        return script if plan is None else FaultScript(plan, script, is_raw=self._is_raw)

    def _make_replies(self, connection: Connection) -> Script:
        if self._config.mode != "identify":
            return EchoScript(is_raw=self._is_raw)
        slot = connection.slot
        return IdentifyScript(
            partial(describe_connection, self._config, slot.peername, slot.header, connection.get_extra_info)
        )


def describe_connection(
    config: ServerConfig, peername: object, header: ProxyHeader | None, get_extra_info: Callable[[str], Any]
) -> Describer:
    """Return what makes the replies of a connection. ``peername`` is the client that a PROXY header states.

    ``get_extra_info`` returns ``sockname``, ``peername`` and ``tls`` as that of :class:`asyncio.BaseTransport` does.
    """
    server = Responder(
        platform.node(),
        os.getpid(),
        format_address(get_extra_info("sockname")),
        sys.modules[__name__.partition(".")[0]].__version__,  # not imported: the package imports this module
        config.engine,
        dict(config.labels or {}),
    )
    peer, tls = get_extra_info("peername"), get_extra_info("tls")
    return Describer(
        server,
        Kubernetes.of(os.environ),
        Address.of(_with_zone(peername or peer)),
        None if header is None else Proxy.of(_with_zone(peer), header),
        None if tls is None else Tls.of(tls.session, tls.server_name),
    )


def _with_zone(name: Any) -> Any:
    return (get_host(name), name[1]) if isinstance(name, tuple) else name
