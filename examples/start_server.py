"""The echo server with one coroutine per client: ``python examples/start_server.py [PORT]``.

Compare ``serve_client`` with the one in ``threads.py``: the same steps in the same order. Each ``await`` marks a
place where this coroutine waits while the event loop runs the others, all in one thread. Nothing interrupts a
coroutine between two ``await``, so what it does there needs no lock.
"""

import asyncio
import contextlib
import sys

CHUNK_SIZE = 20  # bytes requested at each read


async def serve_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read up to the first newline, send the same bytes back, close."""
    with contextlib.closing(writer), contextlib.suppress(OSError):  # the client may reset the connection at any time
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
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5500))
