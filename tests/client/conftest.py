"""Fixtures of the client tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from clients import CLIENTS, Connect, Echo, client_functions
from support import LOOPS, run

from echo_async.loops import LoopName

T = TypeVar("T")


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    """The blocking client, and the asyncio client on each event loop."""
    kind: str = request.param
    return kind


@pytest.fixture
def functions(client: str) -> Iterator[tuple[Connect, Echo]]:
    with client_functions(client) as functions:
        yield functions


@pytest.fixture
def connect(functions: tuple[Connect, Echo]) -> Connect:
    """Connect with each client: ``with connect(...) as client``, whose methods block."""
    return functions[0]


@pytest.fixture
def echo(functions: tuple[Connect, Echo]) -> Echo:
    """Send one message with each client, on a connection of its own."""
    return functions[1]


@pytest.fixture(params=LOOPS)
def on_loop(request: pytest.FixtureRequest) -> Callable[[Callable[[], Coroutine[Any, Any, T]]], T]:
    """Run a coroutine function on each event loop; it must leave no task and no error of the loop."""
    loop: LoopName = request.param

    def run_and_check(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        errors: list[dict[str, Any]] = []

        async def watched() -> T:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
            result = await main()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return result

        result: T = run(watched, loop)
        assert not errors
        return result

    return run_and_check
