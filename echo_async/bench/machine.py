"""The machine on which a benchmark ran."""

import os
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__


def machine_info() -> dict[str, Any]:
    """Describe the machine, the interpreter and this package, without the names of the machine and its user."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "echo_async": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "uvloop": _installed_version("uvloop"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cpus": len(available_cpus()),
        "memory_gib": _memory_gib(),
        "load_average": [round(each, 2) for each in os.getloadavg()],
    }


def available_cpus() -> list[int]:
    """Return the CPUs on which this process may run; none where the system does not support affinity."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


def separate_cpus() -> tuple[list[int], list[int], list[int]]:
    """Return a CPU for the server, the load and a disturbance each. The load shares its CPU if there are only two.

    There are none on a machine with one.
    """
    cpus = available_cpus()
    return ([cpus[0]], [cpus[1]], [cpus[min(2, len(cpus) - 1)]]) if len(cpus) > 1 else ([], [], [])


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    with suppress(OSError, ValueError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None
