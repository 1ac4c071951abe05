"""``python -m echo_async.bench.worker``: one process of a load, started by its parent.

stdin brings one line of JSON: the plan and the number of the first connection. The worker writes ``ready`` to
stdout once the connections are open. stdin brings the start time, and stdout gets the result. More input or
the end of stdin stops the load, so that a worker never outlives its parent.
"""

import json
import signal
import sys
from contextlib import suppress
from io import FileIO
from pathlib import Path

from ..compat import raise_descriptor_limit
from ..stdio import standard_streams
from .generator import LoadGenerator
from .plan import LoadPlan


@standard_streams()
def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which closes stdin
    raise_descriptor_limit()
    with suppress(OSError):  # Linux may prolong a sleep by 50 µs to save power, unless this is 1 ns
        Path("/proc/self/timerslack_ns").write_text("1")
    commands = FileIO(sys.stdin.fileno(), closefd=False)  # unbuffered: the selector sees further input
    request = json.loads(commands.readline())
    generator = LoadGenerator(LoadPlan.from_json(request["plan"]), first=request["first"])
    generator.connect()
    print("ready", flush=True)
    start = commands.readline()
    if start:
        generator.stop_on_input(commands.fileno())
        generator.run(float(start)).write(sys.stdout.buffer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
