"""For every test."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # however slow or busy it is
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """What the session itself has made stays until its end: a full collection need not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def loggers_as_before() -> Iterator[None]:
    """A command that runs in this process configures the log; it is undone."""
    package = logging.getLogger("echo_async")
    handlers, level, propagate, raising = package.handlers, package.level, package.propagate, logging.raiseExceptions
    yield
    package.handlers, package.propagate, logging.raiseExceptions = handlers, propagate, raising
    package.setLevel(level)
