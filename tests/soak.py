"""Soak tests, which take minutes: many clients, faulty clients, killed workers, constant memory.

``make soak`` runs all of them; ``python tests/soak.py --help`` lists the options to run some. Each scenario starts a
server process, prints each measurement with its limit, and fails if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import resource
import select
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trustme
from support import ServerProcess, command_process, server_process, wait_until

BACKENDS = {
    "protocol-uvloop": ["--engine", "protocol", "--loop", "uvloop"],
    "protocol-asyncio": ["--engine", "protocol", "--loop", "asyncio"],
    "streams-uvloop": ["--engine", "streams", "--loop", "uvloop"],
    "streams-asyncio": ["--engine", "streams", "--loop", "asyncio"],
    "threads": ["--engine", "threads"],
}
TIMEOUT = 60.0
SOURCES = [f"127.0.1.{number}" for number in range(1, 33)]  # one source address does not have enough ports


@contextmanager
def server(*args: str) -> Iterator[ServerProcess]:
    with server_process("--no-access-log", *args) as process:
        yield process


def memory(process: ServerProcess) -> int:
    """Return the resident memory in KiB."""
    [line] = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.process.pid}/status").read_text())
    return int(line)


def descriptors(process: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{process.process.pid}/fd"))


def cpu_time(process: ServerProcess) -> list[str]:
    return Path(f"/proc/{process.process.pid}/stat").read_text().split()[13:15]


def stop(process: ServerProcess) -> float:
    """Stop the server. Return the seconds that it took."""
    start = time.monotonic()
    process.process.terminate()
    log, code = process.wait(None), process.process.returncode
    if code or "Traceback" in log:
        check("clean exit", f"exit code {code}, log:\n{log}", False)
    return time.monotonic() - start


failures: list[str] = []


def check(name: str, value: object, is_ok: bool, limit: str = "") -> None:
    """Print a measurement, and record a failure unless ``is_ok``."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    print(f"    {'ok  ' if is_ok else 'FAIL'} {name}: {text}{f'  (limit: {limit})' if limit else ''}", flush=True)
    if not is_ok:
        failures.append(name)


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
    """Return the 99th percentile of ``count`` round trips, in seconds."""
    async with clients(port, 1) as [client]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            assert await echo(client, b"probe\n")
            times.append(time.perf_counter() - start)
        return statistics.quantiles(times, n=100)[98]


async def wait_for_descriptors(process: ServerProcess, limit: int) -> None:
    """Wait until the server has at most ``limit`` descriptors."""
    await asyncio.to_thread(wait_until, lambda: descriptors(process) <= limit)


async def idle(backend: str, scale: float) -> None:
    """Thousands of idle clients: all get replies, and one signal closes all connections."""
    count = int((2_000 if backend == "threads" else 10_000) * scale)
    with server(*BACKENDS[backend], "--mode", "stream") as process:
        before = memory(process)
        async with clients(process.address[1], count) as opened:
            answers = await asyncio.gather(*(echo(client, b"Hola Server!\n") for client in opened))
            check(f"replies to {count} clients", sum(answers), all(answers))
            check("memory per client, KiB", (memory(process) - before) / count, True)
            answers = await asyncio.gather(*(echo(client, b"still there\n") for client in opened))
            check("replies to second messages", sum(answers), all(answers))
            took = await asyncio.to_thread(stop, process)
            check("seconds from the signal to the exit", took, took <= 2, "2")


async def non_readers(backend: str, scale: float) -> None:
    """A thousand clients that send and never read: memory is bounded, and another client is not delayed."""
    count = int(1_000 * scale)
    with server(*BACKENDS[backend], "--mode", "stream") as process:
        await latency(process.address[1])
        idle = await latency(process.address[1])
        before = memory(process)
        async with clients(process.address[1], count) as opened:
            flood = b"x" * 1023 + b"\n"
            for _, writer in opened:
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(flood * 4096)
            cpu: list[str] = []
            while cpu != (cpu := cpu_time(process)):  # noqa: ASYNC110 (until the server is idle: there is no event for it)
                await asyncio.sleep(0.5)
            growth = (memory(process) - before) / count
            check("memory per client, KiB", growth, growth <= 512, "512")
            loaded = await latency(process.address[1])
            check("p99 of another client, ratio to an idle server", loaded / idle, loaded <= 2 * idle, "2")
        check("seconds to exit", await asyncio.to_thread(stop, process), True)


async def churn(backend: str, scale: float) -> None:
    """Connect, echo, close, 100,000 times; 1 % of the clients are faulty. Nothing leaks."""
    rounds = int(100_000 * scale)
    with server(*BACKENDS[backend]) as process:
        opened = descriptors(process)
        failed = await cycles(process.address[1], rounds // 5)
        await wait_for_descriptors(process, opened)
        before = memory(process)
        failed += await cycles(process.address[1], rounds - rounds // 5)
        check(f"failures of {rounds} healthy clients", failed, failed == 0, "0")
        await wait_for_descriptors(process, opened)
        check("additional descriptors", descriptors(process) - opened, descriptors(process) == opened, "0")
        growth = (memory(process) - before) / 1024
        check("additional memory after the warm-up, MiB", growth, growth <= 5, "5")
        stop(process)


COUNTING_SERVER = """
import gc, json, sys, threading, tracemalloc
from echo_async.cli.server import main

def report():
    sys.stdin.readline()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    while True:
        objects = sum("echo_async" in str(type(each)) for each in gc.get_objects())
        garbage = collect()
        print(json.dumps([objects, garbage, tracemalloc.get_traced_memory()[0]]), flush=True)
        sys.stdin.readline()

def collect():
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    types = {type(each).__name__ for each in gc.garbage}
    gc.garbage.clear()
    gc.collect()
    return sorted(types)

threading.Thread(target=report, daemon=True).start()
sys.exit(main(sys.argv[1:]))
"""


# A transport of asyncio has bound methods of its own (selector_events.py, ``_read_ready_cb``).
TRANSPORT_CYCLE = {"_SelectorSocketTransport", "TransportSocket", "socket", "method", "dict", "tuple"}


async def leaks(backend: str, scale: float) -> None:
    """Connect, echo, close, 100,000 times, 1 % of the clients are faulty: no object is left, and no cyclic garbage."""
    rounds = int(100_000 * scale)
    command = [sys.executable, "-c", COUNTING_SERVER, *BACKENDS[backend], "--port=0", "--no-access-log"]
    with command_process(command, stdin=subprocess.PIPE) as process:

        async def count() -> list[Any]:
            await asyncio.sleep(2.5)  # a sweep keeps the connections that it found open until the next one
            process.process.stdin.write("\n")
            process.process.stdin.flush()
            report: list[Any] = json.loads(process.process.stdout.readline())
            return report

        opened = descriptors(process)
        failed = await cycles(process.address[1], 1000)
        await wait_for_descriptors(process, opened)
        objects, _, size = await count()
        failed += await cycles(process.address[1], rounds)
        await wait_for_descriptors(process, opened)
        check(f"failures of {rounds} healthy clients", failed, failed == 0, "0")
        later, garbage, grown = await count()
        check("additional objects of this package", later - objects, later <= objects, "0")
        check("additional memory of Python, KiB", (grown - size) / 1024, grown - size <= 100 * 1024, "100")
        own = TRANSPORT_CYCLE if backend.endswith("asyncio") else set()
        check("types of cyclic garbage", garbage, own.issuperset(garbage), str(sorted(own)))
        stop(process)


async def cycles(port: int, rounds: int) -> int:
    generator = random.Random(rounds)
    numbers = iter(range(rounds))
    failed = 0

    async def work() -> None:
        nonlocal failed
        for number in numbers:
            reader, writer = await open_client(port, number)
            fault = generator.random() if number % 100 == 0 else 1.0
            try:
                if fault < 0.5:  # a reset within a message
                    writer.write(b"incomplete")
                    connection = writer.get_extra_info("socket")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                elif fault < 1.0:  # a half-close without a message
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


async def worker_of(client: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> int:
    """Return the process id of the worker that serves a client of a server in ``identify`` mode."""
    reader, writer = client
    writer.write(b"which worker?\n")
    return int(json.loads(await reader.readline())["server"]["pid"])


async def workers(backend: str, scale: float) -> None:
    """Connections are distributed evenly; a worker that is killed or hangs fails no client that connects later."""
    options = (*BACKENDS[backend], "--mode", "identify", "--workers")
    for number in (2, 4):
        count = int(1000 * scale)
        with server(*options, str(number)) as process:
            async with clients(process.address[1], count) as opened:
                counts = Counter([await worker_of(each) for each in opened])
            busiest = max(counts.values()) * number / count
            check(f"busiest of {number} workers, {count} connections: times the mean", busiest, busiest <= 1.3, "1.3")
    with server(*options, "2") as process:
        await kill_workers(process.address[1], kills=10)
        async with clients(process.address[1], 1) as [client]:
            os.kill(await worker_of(client), signal.SIGSTOP)
            start = time.monotonic()
            async with clients(process.address[1], 20) as opened:
                await asyncio.gather(*map(worker_of, opened))
        took = time.monotonic() - start
        check("seconds until a hung worker is replaced and 20 clients are served", took, took <= 5, "5")
        await asyncio.to_thread(stop, process)


def kill(process: int) -> None:
    """Kill a process, and block until it is dead: no client connects meanwhile."""
    descriptor = os.pidfd_open(process)
    os.kill(process, signal.SIGKILL)
    select.select([descriptor], [], [])
    os.close(descriptor)


async def kill_workers(port: int, kills: int) -> None:
    """Kill a worker ``kills`` times while 8 clients connect for each message."""
    served: list[tuple[float, int]] = []  # when a client began to connect, and the worker that served it
    failed: list[tuple[float, float]] = []  # when a client began to connect, and when it failed
    killed: list[float] = []  # when a worker was dead

    async def connect_repeatedly() -> None:
        while len(killed) < kills or served[-1][0] < killed[-1] + 1:
            start = time.monotonic()
            try:
                async with clients(port, 1) as [client]:
                    served.append((start, await worker_of(client)))
            except (OSError, ValueError):  # reset, or closed before the reply
                failed.append((start, time.monotonic()))

    load = [asyncio.create_task(connect_repeatedly()) for _ in range(8)]
    for _ in range(kills):
        count = len(served)
        await asyncio.to_thread(wait_until, lambda: len(served) > count + 100)  # noqa: B023
        kill(served[-1][1])
        killed.append(time.monotonic())
        await asyncio.sleep(1)  # between two kills, as the clients connect all the time
    await asyncio.gather(*load)
    later = [each for each in failed if not any(each[0] <= kill <= each[1] for kill in killed)]
    check(f"failures of {len(served)} clients that connected after one of {kills} kills", len(later), not later, "0")


async def large_messages(backend: str, scale: float) -> None:
    """1,000 messages of 1 MiB on 10 connections: the memory is reused or returned."""
    message = b"x" * (1024 * 1024 - 1) + b"\n"

    async def exchange(client: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        for _ in range(100):
            client[1].write(message)
            assert await client[0].readexactly(len(message)) == message

    with server(*BACKENDS[backend], "--mode", "stream", "--chunk-size", "65536") as process:
        before = memory(process)
        async with clients(process.address[1], 10) as opened:
            await asyncio.gather(*map(exchange, opened))
            grown = (memory(process) - before) / 1024
        limit = {"protocol-uvloop": 8, "protocol-asyncio": 12}.get(backend, 64)
        check("memory afterwards, MiB more than before", grown, grown <= limit, f"{limit}")
        stop(process)


@contextmanager
def memory_cgroup(process: ServerProcess, size: int) -> Iterator[bool]:
    """Limit a process to ``size`` more bytes; yield whether that is possible here."""
    parent, limit = Path("/sys/fs/cgroup"), "memory.max"
    if (parent / "memory").is_dir():  # version 1
        parent, limit = parent / "memory", "memory.limit_in_bytes"
    cgroup = parent / f"echo-async-{os.getpid()}"
    try:
        is_limited = True
        cgroup.mkdir()
        (cgroup / limit).write_text(str(size))
        (cgroup / "cgroup.procs").write_text(str(process.process.pid))
    except OSError:
        is_limited = False
    try:
        yield is_limited
    finally:
        process.process.kill()
        process.process.wait(TIMEOUT)
        if cgroup.is_dir():
            cgroup.rmdir()


async def pod(backend: str, scale: float) -> None:
    """The pod of the manifest, in each mode: 2,000 clients that send incomplete messages, or read no replies."""
    manifest = Path(__file__).parent.parent.joinpath("deploy", "kubernetes", "deployment.yaml").read_text()
    limits = dict(re.findall(r'name: ECHO_ASYNC_(LIMIT_\w+), value: "(\d+)"', manifest))
    available, size = int(*re.findall(r"limits: {memory: (\d+)Mi}", manifest)), int(limits["LIMIT_MESSAGE_SIZE"])
    message = b"\x01" * (size - 1)  # which mode identify escapes
    attacks = {"incomplete": message, "unread": (message + b"\n") * (2**21 // size)}
    options = [*BACKENDS[backend], *(f"--{name.lower()}={value}".replace("_", "-") for name, value in limits.items())]
    for listener in ("", ",tls", ",proxy-protocol=auto,proxy-allow-from=127.0.0.1"):
        options.append(f"--listen=127.0.0.1:0{listener}")
    authority = trustme.CA()
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    with authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.tempfile() as path:
        for mode, (name, payload) in itertools.product(("message", "stream", "raw", "identify"), attacks.items()):
            command = [sys.executable, "-m", "echo_async.server", "--no-access-log", *options]
            with command_process([*command, f"--ssl-certfile={path}", f"--mode={mode}"]) as process:
                before = memory(process)
                with memory_cgroup(process, available * 2**20 - before * 1024) as is_limited:
                    if not is_limited:
                        return print("    skipped: no memory cgroup can be made here")
                    await attack_pod(process, f"{mode}, {name}", payload, int(2000 * scale), context)


async def attack_pod(process: ServerProcess, name: str, payload: bytes, count: int, context: ssl.SSLContext) -> None:
    """Attack the server; it must answer another client then, and each client must be accepted or refused."""
    ports = [process.address[1], *(int(process.process.stdout.readline().rpartition(":")[2]) for _ in range(2))]
    attackers = [connect_attacker(ports, number, context) for number in range(count)]
    for _ in range(5):
        process.process.send_signal(signal.SIGSTOP)  # so that it reads much at once
        for attacker in attackers:
            send_unread(attacker, payload)
        process.process.send_signal(signal.SIGCONT)
        await asyncio.sleep(2)  # to read as much as it does: it need not read all
    check(f"MiB, {name}", memory(process) / 1024, True)
    for attacker in attackers:
        attacker.close()
    await wait_for_descriptors(process, 100)
    async with clients(ports[0], 1) as [(reader, writer)]:
        writer.write(b"alive\n")
        check("reply to another client", b"alive" in await reader.readline(), True)
    log = process.stop()
    counted = {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", log)}
    total = counted["accepted"] + counted["refused"]
    check("clients that are accepted or refused", total, total == count + 1, str(count + 1))


def connect_attacker(ports: list[int], number: int, context: ssl.SSLContext) -> socket.socket:
    """Connect to one of the listeners: plain, with TLS, or as a proxy."""
    client = socket.create_connection(("127.0.0.1", ports[number % 3]), TIMEOUT)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with suppress(OSError):  # it is refused
        if number % 3 == 1:
            client = context.wrap_socket(client, server_hostname="127.0.0.1")
        elif number % 3 == 2:
            client.sendall(b"PROXY UNKNOWN\r\n")
        client.setblocking(False)
    return client


def send_unread(attacker: socket.socket, payload: bytes) -> None:
    """Send as much as fits into the buffers of the kernel."""
    view = memoryview(payload)
    with suppress(OSError):
        while view:
            view = view[attacker.send(view[: 64 * 1024]) :]


async def idle_tls(backend: str, scale: float) -> None:
    """Hundreds of idle clients over TLS: memory per client."""
    count, ca = int(500 * scale), trustme.CA()
    context = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
    with TemporaryDirectory() as folder:
        path = Path(folder, "server.pem")
        ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(path))
        with server(*BACKENDS[backend], "--mode", "stream", "--ssl-certfile", str(path)) as process:
            before = memory(process)
            opened = [await asyncio.open_connection(*process.address, ssl=context) for _ in range(count)]
            answers = [await echo(client, b"Hola Server!\n") for client in opened]
            check(f"replies to {count} clients", sum(answers), all(answers))
            check("memory per client, KiB", (memory(process) - before) / count, True)
            for _, writer in opened:
                writer.transport.abort()
            stop(process)


SCENARIOS: dict[str, Callable[[str, float], Coroutine[None, None, None]]] = {
    "idle": idle,
    "churn": churn,
    "leaks": leaks,
    "non-readers": non_readers,
    "workers": workers,
    "large-messages": large_messages,
    "idle-tls": idle_tls,
    "pod": pod,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", choices=[[], *SCENARIOS], default=[], metavar="SCENARIO")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of clients")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for name in args.scenarios or SCENARIOS:
        for backend in args.backends:
            print(f"{name} {backend}: {(SCENARIOS[name].__doc__ or '').strip()}", flush=True)
            asyncio.run(SCENARIOS[name](backend, args.scale))
    print(f"{len(failures)} checks failed" + "".join(f"\n  {each}" for each in failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
