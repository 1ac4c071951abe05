"""A minimal gevent server with one greenlet per client and large reads, without framing."""

from gevent.server import StreamServer
from gevent.socket import IPPROTO_TCP, TCP_NODELAY


def echo(client, address) -> None:
    client.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
    while data := client.recv(65536):
        client.sendall(data)


server = StreamServer(("127.0.0.1", 0), echo, backlog=512)
server.start()
print(f"listening on 127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
