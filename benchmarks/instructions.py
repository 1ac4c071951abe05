"""Count the instructions that the servers of this package execute per connection, with one message on each.

``python benchmarks/instructions.py`` prints them, and the difference to those that ``instructions.json`` has for the
same version of Python. ``--save`` writes them there, ``--bare`` counts those of ``peers/lingering.py`` instead.
valgrind counts, so other programs have hardly any influence: two runs differ by less than 2 %.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from echo_async.bench.server import ServerProcess, server_command
from echo_async.config import EngineName

RECORDED = Path(__file__).with_name("instructions.json")
LINGERING = RECORDED.parent / "peers" / "lingering.py"
SERVERS: list[tuple[EngineName, str]] = [
    ("protocol", "uvloop"),
    ("protocol", "asyncio"),
    ("streams", "uvloop"),
    ("streams", "asyncio"),
    ("threads", "asyncio"),
]
MESSAGE = b"Hola Server!\n"
CONNECTIONS = 20  # at a time
WARMUP_ROUNDS, ROUNDS = 10, 100  # of as many connections
CHUNK_SIZE = 20  # bytes
TIMEOUT = 60.0  # seconds for each step of a client: the server is some 50 times slower than without valgrind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"record the counts in {RECORDED.name}")
    parser.add_argument("--bare", action="store_true", help="minimal servers that end a connection in the same way")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        sys.exit("skipped: valgrind is not installed")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    recorded: dict[str, dict[str, int]] = json.loads(RECORDED.read_text())
    counts = recorded.setdefault(version, {})
    print(f"instructions per connection, Python {version}")
    for engine, loop in SERVERS:
        name, command = f"{engine} {loop}", server_command(engine, loop, CHUNK_SIZE, "message", len(MESSAGE))
        if options.bare:
            name, command = f"bare {name}", [sys.executable, str(LINGERING), engine, loop]
        count, before = count_instructions(command), counts.get(name)
        print(f"{name:18}{count:9,}", "" if before is None else f"{count / before - 1:+7.1%}", flush=True)
        counts[name] = count
    if options.save:
        RECORDED.write_text(json.dumps(recorded, indent=2) + "\n")


def count_instructions(command: Sequence[str]) -> int:
    """Return the instructions in user mode that a server executes per connection."""
    with tempfile.TemporaryDirectory() as directory:
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--log-file={directory}/%p.log"]
        with ServerProcess([*valgrind, f"--callgrind-out-file={directory}/out", *command]) as server:
            process = next(Path(directory).glob("*.log")).stem
            exchange(server.address, WARMUP_ROUNDS)
            switch("on", process)
            exchange(server.address, ROUNDS)
            switch("off", process)
        found = re.findall(r"^(?:summary|totals): (\d+)", Path(directory, "out").read_text(), re.MULTILINE)
        return int(found[-1]) // (ROUNDS * CONNECTIONS)


def switch(state: str, process: str) -> None:
    """Begin or end counting."""
    command = ["callgrind_control", "-i", state, process]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT)


def exchange(address: tuple[str, int], rounds: int) -> None:
    """Send a message on each of ``CONNECTIONS`` connections, then receive all replies; ``rounds`` times."""
    for _ in range(rounds):
        clients = [socket.create_connection(address, TIMEOUT) for _ in range(CONNECTIONS)]
        for client in clients:
            client.sendall(MESSAGE)
        for client in clients:
            with client, client.makefile("rb") as replies:
                if (received := replies.read()) != MESSAGE:
                    sys.exit(f"received {received!r}, expected {MESSAGE!r}")


if __name__ == "__main__":
    main()
