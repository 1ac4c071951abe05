"""The check of servers in ``identify`` mode: which ones answer, and what the path changes."""

from collections import Counter

from ..net import format_address
from ..wire.identity import Identity
from ..wire.proxy import parse_address
from ..wire.text import escape
from .context import IDENTIFY, Context
from .explanation import quote
from .result import Failure, Skip

SAMPLES = 8  # connections; a load balancer distributes them
SEVERAL_MODES = "not all servers behind this address are in mode identify"


def check_identity(context: Context) -> str:
    if context.mode is not IDENTIFY:
        raise Skip(f"a server in mode {context.mode.name} reports nothing about itself")
    servers: Counter[str] = Counter()
    for _ in range(SAMPLES):
        connection = context.open()
        source = context.endpoint.config.proxy_source
        own = connection.socket.getsockname() if source is None else parse_address(source)
        connection.send(b"identity\n")
        context.wait(lambda: connection.ending or connection.lines)  # noqa: B023
        line = bytes(connection.received)
        context.compare(connection, b"identity\n", "the server reports no identity")
        try:
            found = Identity.parse(line)
        except ValueError as error:
            raise Failure(f"{quote(line)} without a description", SEVERAL_MODES) from error
        server = found.server
        servers[f"{found.kubernetes.pod or server.hostname} pid {server.pid} at {server.address}"] += 1
    answers = ", ".join(f"{escape(name)} ({count} of {SAMPLES})" for name, count in servers.items())
    return "; ".join((answers, *_describe_path(found, own)))


def _describe_path(found: Identity, own: object) -> list[str]:
    client = found.client
    address = format_address((client.address, client.port) if client.port is not None else client.address)
    if not isinstance(own, tuple):
        facts = ["Unix socket"]
    elif (client.address, client.port) == own[:2]:
        facts = [f"client address {address} is ours"]
    else:
        facts = [f"client address {address} is not ours ({format_address(own)}), but that of a proxy or NAT"]
    proxy = found.proxy
    facts.append("no PROXY header" if proxy is None else f"PROXY v{proxy.version} from {proxy.peer.address}")
    facts.append("no TLS" if found.tls is None else f"TLS {found.tls.version}, {found.tls.cipher}")
    return [escape(each) for each in facts]
