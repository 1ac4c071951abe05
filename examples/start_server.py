"""The echo server with one coroutine per client: ``python examples/start_server.py [PORT]``.

``selector.py`` cannot keep the steps of one client together: each wait cuts the program into another function. A
coroutine reads like ``serve_client`` in ``threads.py``, and each ``await`` marks a place where it waits while the event
loop, which is that selector, runs the others. Nothing interrupts it between two ``await``: no lock is needed.
"""

import asyncio
import contextlib
import sys

CHUNK_SIZE = 20  # bytes requested at each read: few, so that you can watch a message arrive in pieces; not fast


async def serve_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read up to the first newline, send the same bytes back, close."""
    # The client may reset the connection at any time, and Ctrl-C cancels the coroutine.
    with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.CancelledError):
        message, chunk = bytearray(), b""
        while b"\n" not in chunk:
            chunk = await reader.read(CHUNK_SIZE)
            if not chunk:  # the client closed its sending side before the newline: there is nothing to answer
                return
            message += chunk
        end = message.index(b"\n") + 1
        writer.write(bytes(message[:end]))
        writer.write_eof()  # end of the reply; closing with unread input would reset the connection
        await writer.drain()
        while await reader.read(CHUNK_SIZE):
            pass


async def main(port: int) -> None:
    server = await asyncio.start_server(serve_client, "127.0.0.1", port)
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.Event().wait()  # until Ctrl-C; Server.serve_forever would then wait for the clients to leave


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5500))
