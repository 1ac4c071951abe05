"""``python -m echo_async.bench.worker``: one process of a load, as its parent runs it.

A line of JSON comes in on stdin: the plan, and the number of the first connection. ``ready`` goes out once the
connections are open; a line with the moment to start comes in; the recorder goes out. Anything more on
stdin, or its end, stops the load: a worker never outlives its parent.
"""

from __future__ import annotations

import json
import signal
import sys
from io import FileIO

from ..stdio import standard_streams
from .generator import LoadGenerator, raise_descriptor_limit
from .plan import LoadPlan
from .recorder import write_results

__all__ = ["main"]


def main() -> int:
    with standard_streams():
        return _run()


def _run() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends stdin
    raise_descriptor_limit()
    commands = FileIO(sys.stdin.fileno(), closefd=False)  # unbuffered: what follows stays where a selector sees it
    asked = json.loads(commands.readline())
    generator = LoadGenerator(LoadPlan.from_json(asked["plan"]), first=asked["first"])
    generator.connect()
    print("ready", flush=True)
    start = commands.readline()
    if start:
        generator.stop_on(commands.fileno())
        write_results(generator.run(float(start)), sys.stdout.buffer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
