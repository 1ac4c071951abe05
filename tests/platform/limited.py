"""``python limited.py MODULE [ARGUMENT...]`` runs a module as ``python -m`` does, without what Windows lacks.

The event loops of asyncio get the limits of ``asyncio.ProactorEventLoop``.
"""

import os
import runpy
import select
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

MISSING_MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "uvloop")
MISSING_ATTRIBUTES = {
    os: ("fork", "getloadavg", "mkfifo", "sched_getaffinity", "sched_setaffinity"),
    select: ("epoll", "poll"),
    selectors: ("EpollSelector", "PollSelector"),
    signal: ("SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "pthread_sigmask", "setitimer", "sigwait"),
    socket: ("AF_UNIX", "CMSG_SPACE", "IPV6_RECVTCLASS", "IP_RECVTOS", "MSG_DONTWAIT"),
}
MISSING_LOOP_METHODS = (
    "add_reader",
    "add_signal_handler",
    "add_writer",
    "create_unix_connection",
    "create_unix_server",
    "remove_reader",
    "remove_signal_handler",
    "remove_writer",
)


def socketpair() -> tuple[socket.socket, socket.socket]:
    """Connect a pair of sockets over TCP, as :func:`socket.socketpair` does on Windows."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        return first, listener.accept()[0]


def for_asyncio_only(method: Callable[..., Any]) -> Callable[..., Any]:
    def limited(*arguments: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].partition(".")[0] != "asyncio":
            raise NotImplementedError
        return method(*arguments)

    return limited


def limit_platform() -> None:
    if sys.version_info >= (3, 13):  # uses sched_getaffinity otherwise
        os.process_cpu_count = os.cpu_count  # type: ignore[assignment, unused-ignore]
    for module, names in MISSING_ATTRIBUTES.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    for name in MISSING_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # import raises ModuleNotFoundError
    selectors.DefaultSelector = selectors.SelectSelector  # type: ignore[misc, assignment]
    socket.socketpair = socketpair  # type: ignore[assignment]

    import asyncio

    for name in MISSING_LOOP_METHODS:
        setattr(asyncio.SelectorEventLoop, name, for_asyncio_only(getattr(asyncio.SelectorEventLoop, name)))
    # The default event loop is of another class there.
    asyncio.SelectorEventLoop = type("SelectorEventLoop", (asyncio.SelectorEventLoop,), {})  # type: ignore[assignment]


if __name__ == "__main__":
    limit_platform()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
