"""A minimal asyncio.start_server, line by line, on uvloop or, with the argument ``asyncio``, on asyncio's loop."""

import asyncio
import sys


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0, backlog=512, limit=2**24)
    port = server.sockets[0].getsockname()[1]
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.serve_forever()


if "asyncio" in sys.argv:
    asyncio.run(main())
else:
    import uvloop

    uvloop.run(main())
