"""One process of a load, started by :mod:`echo_async.bench.load`. The argument is the descriptor of the channel.

The channel brings one line of JSON: the plan and the number of the first connection. The worker writes ``ready``
once the connections are open. Then the channel brings the start time, and gets the result. More input or the end of
input stops the load, so that a worker never outlives its parent.
"""

import signal
import sys
from contextlib import suppress
from io import BufferedWriter, FileIO
from pathlib import Path

from ..children import receive_settings
from ..compat import raise_descriptor_limit
from ..stdio import standard_streams
from .generator import LoadGenerator
from .plan import LoadPlan


@standard_streams()
def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which closes the channel
    raise_descriptor_limit()
    with suppress(OSError):  # Linux may prolong a sleep by 50 µs to save power, unless this is 1 ns
        Path("/proc/self/timerslack_ns").write_text("1")
    channel = FileIO(int(sys.argv[1]), "r+", closefd=False)  # unbuffered: the selector sees further input
    request = receive_settings(channel)
    generator = LoadGenerator(LoadPlan.from_json(request["plan"]), first=request["first"])
    generator.connect()
    start = b""
    with suppress(ConnectionError):  # the parent has ended
        channel.write(b"ready\n")
        start = channel.readline()
    if not start:
        generator.close()
        return 0
    generator.stop_on_input(channel.fileno())
    with suppress(ConnectionError):
        generator.run(float(start)).write(BufferedWriter(channel))
    return 0


if __name__ == "__main__":
    sys.exit(main())
