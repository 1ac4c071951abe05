"""What the figures were taken on: they mean nothing without it."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__

__all__ = ["available_cpus", "facts", "separate_cpus"]


def facts() -> dict[str, Any]:
    """Of the machine, the interpreter and this package; nothing that names the machine or its user."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "echo_async": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "uvloop": _version("uvloop"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cpus": len(available_cpus()),
        "memory_gib": _memory(),
        "load_average": [round(each, 2) for each in os.getloadavg()],
    }


def available_cpus() -> list[int]:
    """The CPUs that this process may run on; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


def separate_cpus() -> tuple[list[int], list[int]]:
    """One CPU for the server, another for the load, so that neither takes from the other; none where there is one."""
    cpus = available_cpus()
    return ([cpus[0]], [cpus[1]]) if len(cpus) > 1 else ([], [])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    with suppress(OSError, ValueError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None
