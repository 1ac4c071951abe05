"""For every test."""

from __future__ import annotations

import gc

from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # however slow or busy it is
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """What the session itself has made stays until its end: a full collection need not look through it each time."""
    gc.collect()
    gc.freeze()
