"""The interface to systemd: socket activation (``sd_listen_fds(3)``) and notifications (``sd_notify(3)``).

Both do nothing unless systemd started this process.
"""

import contextlib
import os
import socket
from itertools import zip_longest

from ..compat import HAS_UNIX_SOCKETS
from ..errors import describe_error
from ..logs import log

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
UNNAMED = "unknown"


def listen_descriptors() -> dict[int, str]:
    """Return the descriptors and names of the listening sockets passed to this process, and clear the variables.

    Several sockets can have the same name. One without a name is ``unknown``, as for ``sd_listen_fds_with_names(3)``.
    """
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    return {number: name or UNNAMED for number, name in zip_longest(descriptors, names.split(":")[: len(descriptors)])}


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
