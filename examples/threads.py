"""The echo server with one thread per client: ``python examples/threads.py [PORT]``.

``one_client.py`` cannot answer anybody while one client is silent; here each client has a thread, and only that one
waits. ``serve_client`` is the same: it reads from top to bottom, because every call blocks. ``recv`` returns when
bytes have arrived, ``sendall`` when the kernel has taken the reply.
"""

import contextlib
import socket
import sys
import threading

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
            threading.Thread(target=serve_client, args=[client], daemon=True).start()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5500)
