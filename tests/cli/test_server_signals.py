"""SIGHUP: sent by hand or by logrotate, and by a terminal that hangs up."""

from __future__ import annotations

import os
import pty
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support import ServerProcess, command_process, receive_line

# Makes stdin the controlling terminal of the session, then becomes the server.
WITH_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-m", "echo_async.server", "--port", "0", "--mode", "stream", *sys.argv[2:]])
"""


@contextmanager
def server_on_terminal(handling: str, *args: str) -> Iterator[tuple[ServerProcess, int]]:
    """Start a server whose controlling terminal hangs up when the returned descriptor is closed."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", WITH_TERMINAL, handling, *args]
    with command_process(command, stdin=terminal, start_new_session=True) as server:
        os.close(terminal)
        yield server, master


@pytest.mark.parametrize("kind", [[], ["--threaded"], ["--workers", "2"]], ids=" ".join)
def test_terminal_hang_up_drains_the_server(kind: list[str]) -> None:
    """SIGHUP that is sent otherwise closes no connection."""
    with server_on_terminal("default", *kind) as (server, master), server.connect() as client:
        client.sendall(b"first\nincomplete ")
        assert receive_line(client) == b"first\n"
        os.killpg(server.process.pid, signal.SIGHUP)  # workers included
        server.wait_for_log("SIGHUP received: nothing to reload")
        os.close(master)
        server.wait_for_log("SIGHUP received: shutting down")
        client.sendall(b"message\n")
        assert receive_line(client) == b"incomplete message\n"
        log = server.wait()
    assert "exited with code" not in log
    assert "server stopped: accepted=1 " in log


def test_terminal_hang_up_with_nohup_keeps_serving() -> None:
    with server_on_terminal("nohup") as (server, master), server.connect() as client:
        os.close(master)
        server.wait_for_log("SIGHUP received: nothing to reload")
        client.sendall(b"after\n")
        assert receive_line(client) == b"after\n"
        server.stop()
