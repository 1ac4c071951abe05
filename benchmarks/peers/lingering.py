"""Minimal servers for one message per connection that end it as this package does: reply, FIN, discard, close.

``python lingering.py protocol|streams|threads [asyncio|uvloop]``
"""

import asyncio
import socket
import sys
import threading

READ_SIZE, DISCARD_SIZE = 20, 65536


class Lingering(asyncio.Protocol):
    def __init__(self) -> None:
        self.received = b""
        self.is_answered = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.is_answered and (end := self.received.find(b"\n") + 1):
            self.is_answered = True
            self.transport.write(self.received[:end])
            self.transport.write_eof()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    received = b""
    while chunk := await reader.read(READ_SIZE):
        received += chunk
        if end := received.find(b"\n") + 1:
            writer.write(received[:end])
            writer.write_eof()
            while await reader.read(DISCARD_SIZE):
                pass
    writer.close()


def echo_in_thread(client: socket.socket) -> None:
    received = b""
    with client:
        while chunk := client.recv(READ_SIZE):
            received += chunk
            if end := received.find(b"\n") + 1:
                client.sendall(received[:end])
                client.shutdown(socket.SHUT_WR)
                while client.recv(DISCARD_SIZE):
                    pass


async def main() -> None:
    if "protocol" in sys.argv:
        server = await asyncio.get_running_loop().create_server(Lingering, "127.0.0.1", 0, backlog=512)
    else:
        server = await asyncio.start_server(echo, "127.0.0.1", 0, backlog=512)
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if "threads" in sys.argv:
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while True:
        threading.Thread(target=echo_in_thread, args=(listener.accept()[0],), daemon=True).start()
elif "uvloop" in sys.argv:
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())
