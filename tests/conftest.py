"""For every test."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """What the session itself has made stays until its end: a full collection need not look through it each time."""
    gc.collect()
    gc.freeze()
