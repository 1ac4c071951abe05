"""The interface to systemd: socket activation (``sd_listen_fds(3)``) and notifications (``sd_notify(3)``).

Both do nothing unless systemd started this process.
"""

import contextlib
import os
import socket

from ..compat import HAS_UNIX_SOCKETS
from ..errors import describe_error
from ..logs import log

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START


def listen_descriptors() -> list[int]:
    """Return the descriptors of the listening sockets passed to this process, and clear the variables."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return list(range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count)))


def notify(state: str) -> None:
    """Send a state such as ``READY=1`` to the service manager, if NOTIFY_SOCKET is set."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not HAS_UNIX_SOCKETS or not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(ValueError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError as error:
            log.warning("cannot notify the service manager at %s: %s", path, describe_error(error))
