"""The echo server for datagrams: ``python examples/udp.py [PORT]``.

``protocol.py`` cannot answer before a connection exists, and has to search the stream for the end of a message; a
datagram is a message, and arrives whole or not at all. One socket serves all clients, and the server keeps nothing of
them. What it gives up: a datagram can be lost, doubled or overtaken, and nobody is told. Its source can be forged, so
such a server belongs on loopback only, and two of them that are pointed at each other never stop.
"""

import contextlib
import socket
import sys

MAX_SIZE = 65_507  # bytes in a datagram over IPv4


def main(port: int) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", port))
        print(f"listening on 127.0.0.1:{server.getsockname()[1]}", flush=True)
        while True:
            message, client = server.recvfrom(MAX_SIZE)  # the rest of a longer one would be discarded
            with contextlib.suppress(OSError):  # the system does not take the reply: it is lost
                server.sendto(message, client)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5500)
