"""The sockets of a load generator."""

import socket
import sys
from itertools import count

from .plan import LoadPlan

LOOPBACK_SOURCES = 32  # source addresses in message mode, where one connection per message exhausts the ports of one
IP_BIND_ADDRESS_NO_PORT = 24  # Linux; the socket module does not define it


class SocketFactory:
    """Creates non-blocking sockets for the address of a plan."""

    def __init__(self, plan: LoadPlan) -> None:
        self._family = plan.family
        self._sockets = count()
        is_loopback = plan.family == socket.AF_INET and str(plan.address[0]).startswith("127.")
        has_sources = plan.mode == "message" and is_loopback and sys.platform == "linux"
        self._sources = [f"127.0.1.{1 + number}" for number in range(LOOPBACK_SOURCES)] if has_sources else []

    def create(self, connection: int) -> socket.socket:
        created = socket.socket(self._family)
        created.setblocking(False)
        if self._family != socket.AF_UNIX:
            created.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._sources:
            created.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            created.bind((self._sources[(connection + next(self._sockets)) % LOOPBACK_SOURCES], 0))
        return created
