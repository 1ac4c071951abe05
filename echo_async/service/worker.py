"""A worker process: serves inherited listening sockets until the supervisor stops it or exits.

Started only by :mod:`echo_async.service.worker_process`. The argument is the descriptor of the channel; the descriptors
of the listening sockets are in the settings that arrive on it.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from dataclasses import asdict
from typing import Any

from ..children import receive_settings
from ..config import ServerConfig
from ..errors import StartError
from ..logs import configure, log
from ..loops import logged_errors, loop_factory
from ..server.listeners import ListenerConfig
from ..server.server import EchoServer, start_server
from ..stdio import print_error, standard_streams

EXIT_START_FAILED = 3
# Raised by writes to the channel after the supervisor was killed; uvloop raises RuntimeError.
CHANNEL_CLOSED_ERRORS = (ConnectionError, RuntimeError)


@standard_streams()
def main() -> int:
    for number in (signal.SIGINT, signal.SIGHUP):  # sent to the process group; the supervisor handles them
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        with channel.makefile("rb", buffering=0) as lines:
            settings = receive_settings(lines)
        configure(settings["log_level"], settings["log_format"], settings["labels"])
        listeners = [ListenerConfig(ServerConfig(**config), numbers) for config, numbers in settings["listeners"]]
        try:
            with (
                asyncio.Runner(loop_factory=loop_factory(settings["loop"])) as runner,
                logged_errors(runner.get_loop()),
            ):
                runner.run(_serve(listeners, channel))
        except StartError as error:
            print_error(str(error))
            return EXIT_START_FAILED
        return 0


async def _serve(listeners: list[ListenerConfig], channel: socket.socket) -> None:
    server = await start_server(listeners)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked by the supervisor
    reader, writer = await asyncio.open_connection(sock=channel)
    writer.write(_encode_report(ready=True))
    command_task = asyncio.create_task(_handle_commands(server, reader, writer))
    await server.wait_closed()
    command_task.cancel()
    await asyncio.wait([command_task])
    with contextlib.suppress(*CHANNEL_CLOSED_ERRORS):
        writer.write(_encode_report(stats=[asdict(each) for each in await server.fetch_stats()]))
        writer.write_eof()
        await reader.read()  # the supervisor closes first: a command sent to a closed channel loses the report
        writer.close()
        await writer.wait_closed()


async def _handle_commands(server: EchoServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Handle the supervisor's commands; abort when it exits."""
    try:
        with contextlib.suppress(*CHANNEL_CLOSED_ERRORS):
            while line := await reader.readline():
                match json.loads(line)["command"]:
                    case "stats":
                        writer.write(_encode_report(stats=[asdict(each) for each in await server.fetch_stats()]))
                    case "stop":
                        server.close()
                    case "abort":
                        server.abort()
                    case "reload":
                        _reload(server)
    finally:  # also after an unexpected error: a worker without supervisor must exit
        server.abort()


def _reload(server: EchoServer) -> None:
    try:
        server.reload_certificates()
    except StartError as error:  # the files have changed since the supervisor validated them
        log.error("worker %d reload failed, keeping the previous certificates: %s", os.getpid(), error)


def _encode_report(**report: Any) -> bytes:
    return json.dumps(report).encode() + b"\n"


if __name__ == "__main__":
    sys.exit(main())
