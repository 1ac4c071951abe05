"""The echo server for one client at a time: ``python examples/one_client.py [PORT]``.

The first step: everything that a TCP server needs, in the order in which it happens. ``recv`` returns what has
arrived, up to ``CHUNK_SIZE`` bytes, and not a message: the loop collects chunks until one contains the newline.
"""

import contextlib
import socket
import sys

CHUNK_SIZE = 20  # bytes requested at each read: few, so that you can watch a message arrive in pieces; not fast


def serve_client(client: socket.socket) -> None:
    """Read up to the first newline, send the same bytes back, close."""
    with client, contextlib.suppress(OSError):  # the client may reset the connection at any time
        message, chunk = bytearray(), b""
        while b"\n" not in chunk:
            chunk = client.recv(CHUNK_SIZE)
            if not chunk:  # the client closed its sending side before the newline: there is nothing to answer
                return
            message += chunk
        end = message.index(b"\n") + 1
        client.sendall(message[:end])
        client.shutdown(socket.SHUT_WR)  # end of the reply; closing with unread input would reset the connection
        while client.recv(CHUNK_SIZE):
            pass


def main(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as listener:
        print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            client, _ = listener.accept()
            serve_client(client)  # until it returns, everybody else waits


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5500)
