"""What systemd asks of a service: take the sockets that it opened, and say when it is ready and when it stops.

By ``sd_listen_fds(3)`` and ``sd_notify(3)``; both do nothing where systemd did not start this process.
"""

from __future__ import annotations

import contextlib
import os
import socket

from ..logs import log

__all__ = ["listen_descriptors", "notify"]

FIRST = 3  # SD_LISTEN_FDS_START


def listen_descriptors() -> list[int]:
    """The descriptors of listening sockets that were handed to this very process, if any."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return list(range(FIRST, FIRST + int(count)))


def notify(state: str) -> None:
    """Tell the service manager ``state``, such as ``READY=1``, where it asks to be told."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(ValueError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError as error:
            log.warning("cannot tell the service manager at %s that %s: %s", path, state, error.strerror)
