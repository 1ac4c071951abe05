"""What takes minutes to show: many clients, faulty clients, restarts, and memory that stays flat.

Run by ``make soak``; ``python tests/soak.py --help`` tells how to run a part of it. Every scenario starts a
server in a process of its own, prints what it measured beside what is promised, and fails if that is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

KINDS = {
    "protocol-uvloop": ["--engine", "protocol", "--loop", "uvloop"],
    "protocol-asyncio": ["--engine", "protocol", "--loop", "asyncio"],
    "streams-uvloop": ["--engine", "streams", "--loop", "uvloop"],
    "streams-asyncio": ["--engine", "streams", "--loop", "asyncio"],
    "threads": ["--engine", "threads"],
}
PATIENCE = 60.0
SOURCES = [f"127.0.1.{number}" for number in range(1, 33)]  # one address has too few ports for all clients


class Server:
    """A server process, its figures, and whether it kept a promise."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log
        assert process.stdout is not None
        self.port = int(process.stdout.readline().rpartition(b":")[2])

    @property
    def memory(self) -> int:
        """Resident, in KiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1])
        raise AssertionError("the server is gone")

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def log(self) -> str:
        return self._log.read_text()

    def stop(self, number: int = signal.SIGTERM) -> float:
        """Signal it and wait; the seconds that took."""
        began = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        if code or "Traceback" in self.log:
            check("ended cleanly", f"exit code {code}, log:\n{self.log}", False)
        return time.monotonic() - began


@contextmanager
def server(*args: str, nofile: int = 0, **popen: object) -> Iterator[Server]:
    def limit() -> None:
        if nofile:
            resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))

    command = [sys.executable, "-m", "echo_async.server", "--port", "0", "--no-access-log", *args]
    with TemporaryDirectory() as folder, open(Path(folder, "log"), "wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, preexec_fn=limit, **popen)  # type: ignore[call-overload]
        with process:
            try:
                yield Server(process, Path(folder, "log"))
            finally:
                process.kill()


failures: list[str] = []


def check(what: str, value: object, kept: bool, promise: str = "") -> None:
    shown = f"{value:.3f}" if isinstance(value, float) else str(value)
    print(
        f"    {'ok  ' if kept else 'FAIL'} {what}: {shown}{f'  (promised: {promise})' if promise else ''}", flush=True
    )
    if not kept:
        failures.append(what)


async def open_client(port: int, number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(SOURCES[number % len(SOURCES)], 0), limit=2**20)


@asynccontextmanager
async def clients(port: int, count: int) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    try:
        for first in range(0, count, 200):
            some = range(first, min(first + 200, count))
            opened += await asyncio.gather(*(open_client(port, number) for number in some))
        yield opened
    finally:
        for _, writer in opened:
            writer.transport.abort()


async def echo(client: tuple[asyncio.StreamReader, asyncio.StreamWriter], message: bytes) -> bool:
    reader, writer = client
    writer.write(message)
    return await reader.readline() == message


async def latency(port: int, count: int = 1000) -> float:
    """The 99th percentile of a probe's round trips, in seconds."""
    async with clients(port, 1) as [client]:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            assert await echo(client, b"probe\n")
            times.append(time.perf_counter() - began)
        return statistics.quantiles(times, n=100)[98]


async def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise AssertionError("it did not happen")
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def idle(kind: str, scale: float) -> None:
    """Thousands of idle clients: each still echoes in the end, and one signal ends them all."""
    count = int((2_000 if kind == "threads" else 10_000) * scale)
    with server(*KINDS[kind], "--mode", "stream") as it:
        before = it.memory
        async with clients(it.port, count) as opened:
            answers = await asyncio.gather(*(echo(client, b"Hola Server!\n") for client in opened))
            check(f"{count} clients answered", sum(answers), all(answers))
            check("memory a client, KiB", (it.memory - before) / count, True)
            again = await asyncio.gather(*(echo(client, b"still there\n") for client in opened))
            check("answered again", sum(again), all(again))
            took = await asyncio.to_thread(it.stop)
            check("seconds from the signal to the end", took, took <= 2, "2")


async def readers_that_do_not_read(kind: str, scale: float) -> None:
    """A thousand clients that send and never read: bounded memory, and another client does not feel them."""
    count = int(1_000 * scale)
    with server(*KINDS[kind], "--mode", "stream") as it:
        await latency(it.port)
        alone = await latency(it.port)
        before = it.memory
        async with clients(it.port, count) as opened:
            flood = b"x" * 1023 + b"\n"
            for _, writer in opened:
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(flood * 4096)
            seen = -1.0
            while seen != (seen := it.cpu):  # noqa: ASYNC110 (until it takes no more: there is no event for it)
                await asyncio.sleep(0.5)
            grown = (it.memory - before) / count
            check("memory a client, KiB", grown, grown <= 512, "512")
            among = await latency(it.port)
            check("p99 of another client, times what it was alone", among / alone, among <= 2 * alone, "2")
        check("seconds to stop", await asyncio.to_thread(it.stop), True)


async def few_descriptors(kind: str, scale: float) -> None:
    """64 descriptors and 200 clients: some are served, the rest refused; it recovers at once."""
    with server(*KINDS[kind], "--mode", "stream", nofile=64) as it:
        async with clients(it.port, 200) as opened:

            async def served(client: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bool:
                try:
                    return await echo(client, b"in?\n")
                except ConnectionError:
                    return False

            answers = await asyncio.gather(*map(served, opened))
            check("served of 200", sum(answers), 16 <= sum(answers) < 64)
            cpu, began = it.cpu, time.monotonic()
            await asyncio.sleep(2)
            busy = (it.cpu - cpu) / (time.monotonic() - began)
            check("CPU while they wait, of one core", busy, busy < 0.05, "0.05")
            lines = it.log.count("refused") + it.log.count("resource")
            check("log lines about it in some 3 s", lines, lines <= 4, "one a second")
        began = time.monotonic()
        while True:
            with contextlib.suppress(ConnectionError):
                async with clients(it.port, 1) as [client]:
                    if await echo(client, b"room again\n"):
                        break
        check("seconds until it serves again", time.monotonic() - began, time.monotonic() - began < 1, "1")
        it.stop()


async def churn(kind: str, scale: float) -> None:
    """Connect, echo, close, a hundred thousand times, one in a hundred faulty: nothing is left over."""
    rounds = int(100_000 * scale)
    with server(*KINDS[kind]) as it:
        descriptors = it.descriptors
        failed = await cycles(it.port, rounds // 5)
        await until(lambda: it.descriptors <= descriptors)
        memory = it.memory
        failed += await cycles(it.port, rounds - rounds // 5)
        check(f"failed of {rounds} good clients", failed, failed == 0, "0")
        await until(lambda: it.descriptors <= descriptors)
        check("descriptors more than before", it.descriptors - descriptors, it.descriptors == descriptors, "0")
        grown = (it.memory - memory) / 1024
        check("memory more than after the warm-up, MiB", grown, grown <= 5, "5")
        it.stop()


async def cycles(port: int, rounds: int) -> int:
    dice = random.Random(rounds)
    numbers = iter(range(rounds))
    failed = 0

    async def work() -> None:
        nonlocal failed
        for number in numbers:
            reader, writer = await open_client(port, number)
            fault = dice.random() if number % 100 == 0 else 1.0
            try:
                if fault < 0.5:  # a reset in mid-message
                    writer.write(b"begun")
                    hard = writer.get_extra_info("socket")
                    hard.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                elif fault < 1.0:  # half open: it ends its side without a message
                    writer.write_eof()
                    await reader.read()
                else:
                    writer.write(b"%d\n" % number)
                    failed += await reader.read() != b"%d\n" % number
            except ConnectionError:
                failed += fault >= 1.0
            finally:
                writer.close()

    await asyncio.gather(*(work() for _ in range(50)))
    return failed


async def handover(kind: str, scale: float) -> None:
    """Restarts under a socket that is handed over: no client fails."""
    count, restarts = int(10_000 * scale), 5
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        port, number = listener.getsockname()[1], listener.fileno()
        options = (*KINDS[kind], "--fd", str(number))
        done = failed = 0

        async def client(each: int) -> None:
            nonlocal done, failed
            try:
                reader, writer = await open_client(port, each)
                writer.write(b"Hola Server!\n")
                failed += await reader.read() != b"Hola Server!\n"
                writer.close()
            except OSError:
                failed += 1
            done += 1

        async def load() -> None:
            numbers = iter(range(count))

            async def work() -> None:
                for each in numbers:
                    await client(each)

            await asyncio.gather(*(work() for _ in range(20)))

        loading: asyncio.Task[None] | None = None
        for turn in range(restarts + 1):
            with server(*options, pass_fds=[number]) as it:
                loading = loading or asyncio.create_task(load())
                share = count * (turn + 1) // (restarts + 1)
                await until(lambda share=share: done >= share)  # type: ignore[misc]
                await asyncio.to_thread(it.stop)
        assert loading is not None
        await loading
        check(f"failed of {count} clients in {restarts} restarts", failed, failed == 0, "0")


async def a_slow_reader(kind: str, scale: float) -> None:
    """An 8 MiB message to a client that reads slowly, pauses, and reads on: byte for byte, in bounded memory."""
    size = 8 * 1024 * 1024
    message = random.Random(0).randbytes(size - 1).replace(b"\n", b" ") + b"\n"
    with server(*KINDS[kind], "--mode", "stream", "--limit-message-size", str(size)) as it:
        before = it.memory
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port, limit=4096)
        writer.write(message)
        received = bytearray(await reader.readexactly(1))
        most = it.memory
        while len(received) < size:
            received += await reader.read(64 * 1024)
            most = max(most, it.memory)
            await asyncio.sleep(0.2 if len(received) % 64 == 0 else 0.001)
        check("the same bytes", received == message, received == message)
        times = (most - before) * 1024 / size
        check("memory, times the message", times, times <= 2.1 or "protocol" not in kind, "2 for protocol")
        writer.close()
        it.stop()


async def a_flood(kind: str, scale: float) -> None:
    """400 kB to be read 20 bytes at a time from one client: what another client feels of it."""
    with server(*KINDS[kind], "--mode", "stream") as it:
        async with clients(it.port, 2) as [flooder, probe]:
            worst = 0.0
            flooder[1].write(b"x" * 399_999 + b"\n")
            flood = asyncio.create_task(flooder[0].readline())
            while not flood.done():
                began = time.perf_counter()
                assert await echo(probe, b"probe\n")
                worst = max(worst, time.perf_counter() - began)
        check("longest round trip of another client, ms", worst * 1e3, worst <= 0.010 or kind == "threads", "10")
        it.stop()


async def idle_tls(kind: str, scale: float) -> None:
    """Hundreds of idle clients over TLS: what one costs."""
    import ssl

    import trustme

    count = int(500 * scale)
    ca = trustme.CA()
    with TemporaryDirectory() as folder:
        path = Path(folder, "server.pem")
        ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(path))
        context = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
        with server(*KINDS[kind], "--mode", "stream", "--ssl-certfile", str(path)) as it:
            before = it.memory
            opened = [await asyncio.open_connection("127.0.0.1", it.port, ssl=context) for _ in range(count)]
            answers = [await echo(client, b"Hola Server!\n") for client in opened]
            check(f"{count} clients answered", sum(answers), all(answers))
            check("memory a client, KiB", (it.memory - before) / count, True)
            for _, writer in opened:
                writer.transport.abort()
            it.stop()


async def silent_tls(kind: str, scale: float) -> None:
    """A thousand clients that never begin their handshake: gone after its time, and counted."""
    import trustme

    count = int(1_000 * scale)
    with TemporaryDirectory() as folder:
        path = Path(folder, "server.pem")
        trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
        with server(*KINDS[kind], "--ssl-certfile", str(path)) as it:
            descriptors = it.descriptors + 1  # uvloop keeps one in reserve from the first client on
            began = time.monotonic()
            async with clients(it.port, count) as opened:
                await asyncio.gather(*(reader.read() for reader, _ in opened), return_exceptions=True)
                took = time.monotonic() - began
                check("seconds until all were closed", took, 9 < took < 13, "10")
                await until(lambda: it.descriptors <= descriptors)
            it.stop()
            check("counted", f"timeouts_handshake={count}", f"timeouts_handshake={count}" in it.log)


SCENARIOS: dict[str, Callable[[str, float], Coroutine[None, None, None]]] = {
    "idle": idle,
    "churn": churn,
    "non-readers": readers_that_do_not_read,
    "descriptors": few_descriptors,
    "handover": handover,
    "slow-reader": a_slow_reader,
    "flood": a_flood,
    "idle-tls": idle_tls,
    "silent-tls": silent_tls,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS], default=[], metavar="SCENARIO")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of clients")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for name in args.scenarios or SCENARIOS:
        for kind in args.kinds:
            print(f"{name} {kind}: {(SCENARIOS[name].__doc__ or '').strip()}", flush=True)
            asyncio.run(SCENARIOS[name](kind, args.scale))
    print(f"{len(failures)} promises were not kept" + "".join(f"\n  {each}" for each in failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
