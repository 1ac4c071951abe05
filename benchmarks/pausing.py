"""An echo server that blocks for 200 ms of each second, to test whether a load generator shows it.

``python benchmarks/pausing.py PORT``
"""

import asyncio
import sys
import time


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:
        self.write = transport.write

    def data_received(self, data: bytes) -> None:
        self.write(data)


def pause(loop: asyncio.AbstractEventLoop) -> None:
    time.sleep(0.2)  # blocks all connections
    loop.call_later(0.8, pause, loop)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", int(sys.argv[1]))
    loop.call_later(0.8, pause, loop)
    print(f"listening on 127.0.0.1:{sys.argv[1]}", flush=True)
    await server.serve_forever()


asyncio.run(main())
