"""One worker of several: a process that serves sockets which its parent opened, until the parent says stop or dies.

Run by :mod:`echo_async.server.supervisor` only: ``python -m echo_async.server.worker CHANNEL SOCKET...``, where
the arguments are inherited descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any

from ..config import ServerConfig
from ..errors import StartError
from ..logs import configure, log
from ..loops import log_loop_errors, loop_factory
from ..stdio import print_error, standard_streams
from .server import EchoServer, start_server

COULD_NOT_START = 3
# What the channel says when the parent died with an answer unread: uvloop RuntimeError, on writing to it.
CHANNEL_CLOSED = (ConnectionError, RuntimeError)


def main() -> int:
    with standard_streams():
        return _run()


def _run() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent passes it on
    channel, *listeners = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    with channel.makefile("rb", buffering=0) as lines:
        settings = json.loads(lines.readline())
    for listener in listeners:
        listener.setblocking(False)  # the event loops' debug mode asks the object, not the descriptor
    configure(settings["log_level"], settings["log_format"])
    try:
        with asyncio.Runner(loop_factory=loop_factory(settings["loop"])) as runner:
            runner.run(_serve(ServerConfig(**settings["config"]), channel, listeners))
    except StartError as error:
        print_error(str(error))
        return COULD_NOT_START
    return 0


async def _serve(config: ServerConfig, channel: socket.socket, listeners: list[socket.socket]) -> None:
    log_loop_errors(asyncio.get_running_loop())
    server = await start_server(config, listeners)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the parent held it back until now
    reader, writer = await asyncio.open_connection(sock=channel)
    writer.write(_line(ready=True))
    orders = asyncio.create_task(_handle_commands(server, reader, writer))
    await server.wait_closed()
    orders.cancel()
    with contextlib.suppress(*CHANNEL_CLOSED):
        writer.write(_line(stats=asdict(server.stats)))
        writer.close()
        await writer.wait_closed()


async def _handle_commands(server: EchoServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Do what the parent says; end at once when it is gone."""
    try:
        with contextlib.suppress(*CHANNEL_CLOSED):
            while line := await reader.readline():
                match json.loads(line)["do"]:
                    case "stats":
                        writer.write(_line(stats=asdict(server.stats)))
                    case "stop":
                        server.close()
                    case "abort":
                        server.abort()
                    case "reload":
                        _reload(server)
    finally:  # whatever ended it: a worker that takes no orders must not go on
        server.abort()


def _reload(server: EchoServer) -> None:
    try:
        server.reload_certificates()
    except StartError as error:  # the parent has tried it: the files have changed since
        log.error("worker %d: the certificates stay as they were: %s", os.getpid(), error)


def _line(**facts: Any) -> bytes:
    return json.dumps(facts).encode() + b"\n"


if __name__ == "__main__":
    sys.exit(main())
