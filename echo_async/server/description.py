"""Collects the facts of a connection for ``identify`` mode."""

import os
import platform
import sys
from collections.abc import Callable
from typing import Any

from ..config import ServerConfig
from ..net import format_address, get_host
from ..wire.identity import Address, Describer, Kubernetes, Proxy, Responder, Tls
from ..wire.proxy import ProxyHeader


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
