"""The echo server with one selector: ``python examples/selector.py [PORT]``.

``threads.py`` cannot hold ten thousand silent clients without ten thousand threads; here one thread asks the kernel
which sockets are ready. ``serve_client`` has the same steps, but none blocks: where it has to wait, it yields what for,
and the loop in ``main`` continues it once the socket is ready. It is an event loop, and a coroutine.
"""

import contextlib
import selectors
import socket
import sys
from collections.abc import Iterator

CHUNK_SIZE = 20  # bytes requested at each read: few, so that you can watch a message arrive in pieces; not fast


def serve_client(client: socket.socket) -> Iterator[int]:
    """Read up to the first newline, send the same bytes back."""
    message, chunk = bytearray(), b""
    while b"\n" not in chunk:
        yield selectors.EVENT_READ
        chunk = client.recv(CHUNK_SIZE)
        if not chunk:  # the client closed its sending side before the newline: there is nothing to answer
            return
        message += chunk
    reply = message[: message.index(b"\n") + 1]
    while reply:
        yield selectors.EVENT_WRITE
        del reply[: client.send(reply)]  # the kernel takes what fits into its buffer
    client.shutdown(socket.SHUT_WR)  # end of the reply; closing with unread input would reset the connection
    while chunk:
        yield selectors.EVENT_READ
        chunk = client.recv(CHUNK_SIZE)


def main(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as listener, selectors.DefaultSelector() as selector:
        print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    client.setblocking(False)
                    selector.register(client, selectors.EVENT_READ, (client, serve_client(client)))
                    continue
                client, steps = key.data
                try:
                    selector.modify(client, next(steps), (client, steps))
                except (StopIteration, OSError):  # the client may reset the connection at any time
                    selector.unregister(client)
                    client.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5500)
