"""A minimal asyncio protocol, without framing, on uvloop or, with the argument ``asyncio``, on asyncio's loop."""

import asyncio
import sys


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:
        self.write = transport.write

    def data_received(self, data: bytes) -> None:
        self.write(data)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0, backlog=512)
    port = server.sockets[0].getsockname()[1]
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.serve_forever()


if "asyncio" in sys.argv:
    asyncio.run(main())
else:
    import uvloop

    uvloop.run(main())
