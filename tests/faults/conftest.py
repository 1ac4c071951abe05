"""Servers in ``stream`` mode."""

from __future__ import annotations

from functools import partial

import pytest
from support import StartServer


@pytest.fixture
def start_server(start_server: StartServer) -> StartServer:
    """Start servers of each engine on each event loop, in ``stream`` mode unless the options name another."""
    return partial(start_server, mode="stream")
