"""A minimal server with one thread per client and reads of SIZE bytes (default 20), without limits.

``python threads.py [SIZE]``
"""

import socket
import sys
import threading

SIZE = int(sys.argv[1]) if len(sys.argv) > 1 else 20


def echo(client: socket.socket) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    chunks: list[bytes] = []
    with client:
        while chunk := client.recv(SIZE):
            chunks.append(chunk)
            if b"\n" in chunk:
                whole, newline, rest = b"".join(chunks).rpartition(b"\n")
                client.sendall(whole + newline)
                chunks = [rest]


listener = socket.create_server(("127.0.0.1", 0), backlog=512)
port = listener.getsockname()[1]
print(f"listening on 127.0.0.1:{port}", flush=True)
while True:
    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
