"""``handle_echo``: the server for one connection, in an asyncio server of your own."""

import asyncio
from typing import Unpack

from ..config import ServerConfig, ServerOptions
from ..engines.chunk_reader import take_over
from ..engines.context import Slot
from ..engines.streams import StreamConnection, read_ahead
from ..errors import ConfigError
from .registry import Registry
from .sweeper import Sweeper


def handle_echo(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, **options: Unpack[ServerOptions]
) -> asyncio.Task[None]:
    """Echo to one client of your own server: ``asyncio.start_server(echo_async.handle_echo, ...)``.

    It is not a coroutine function because Python 3.11 and 3.12 log a traceback for every handler of
    ``start_server`` that is canceled with its event loop.

    Args:
        reader: The stream to read from. What it has buffered is echoed as well.
        writer: The stream to write to. It is closed at the end.
        **options: Those of :func:`echo_async.serve` that concern one connection: ``mode``, ``chunk_size`` and
            ``limit_message_size`` (bytes), the timeouts (seconds), ``no_access_log``. Set them with
            :func:`functools.partial`.

    Returns:
        A task that is done when the connection is closed. It raises nothing but :exc:`asyncio.CancelledError`.

    Raises:
        ConfigError: An option is invalid. The connection is aborted.
    """
    try:
        config = ServerConfig(**options)
        if config.has_scripts:
            raise ConfigError("handle_echo has neither faults nor identify mode; use echo_async.serve")
        registry = Registry(config)
        chunks = take_over(reader, writer.transport, read_ahead(config), asyncio.get_running_loop())
    except BaseException:
        writer.transport.abort()
        raise
    connection = StreamConnection(registry, Slot(writer.get_extra_info("peername")), chunks, writer)
    connection.establish()
    task = connection.serve()
    sweeper = Sweeper(registry)
    sweeper.start()
    task.add_done_callback(sweeper.stop)
    return task
