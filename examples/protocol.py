"""The echo server with callbacks: ``python examples/protocol.py [PORT]``.

``start_server.py`` cannot get a byte without a buffer in between and a coroutine to resume; here the event loop calls
``data_received`` with what has arrived, and that is all that happens. Nothing waits, so the object keeps what
``threads.py`` has in local variables, and the loop around ``recv`` is gone: each call is one turn of it.
"""

import asyncio
import contextlib
import sys


class EchoProtocol(asyncio.Protocol):
    """One client: send back everything up to the first newline, then close."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.message = bytearray()
        self.is_answered = False

    def data_received(self, data: bytes) -> None:
        if self.is_answered:  # what follows the newline is discarded
            return
        end = len(self.message) + data.find(b"\n") + 1
        self.message += data
        if b"\n" in data:
            self.is_answered = True
            self.transport.write(bytes(self.message[:end]))
            self.transport.write_eof()  # end of the reply; closing with unread input would reset the connection

    def eof_received(self) -> bool:
        return False  # the client closed its sending side: the transport sends what is left and closes


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(EchoProtocol, "127.0.0.1", port)
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.Event().wait()  # until Ctrl-C; Server.serve_forever would then wait for the clients to leave


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5500))
