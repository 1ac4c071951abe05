"""Event loops by name: made by a factory, without a policy."""

from __future__ import annotations

import asyncio
import sys

import pytest
from support import run

from echo_async import EchoError, StartError
from echo_async.loops import LoopName, loop_factory


def module_of_the_loop(name: LoopName) -> str:
    async def look() -> str:
        return type(asyncio.get_running_loop()).__module__

    return run(look, name)


def test_asyncio_is_asyncios_own_loop() -> None:
    assert module_of_the_loop("asyncio").startswith("asyncio.")


def test_uvloop_is_uvloop() -> None:
    assert module_of_the_loop("uvloop").startswith("uvloop")


def test_auto_is_uvloop_where_it_is_installed() -> None:
    assert loop_factory("auto") is loop_factory("uvloop")
    assert loop_factory() is loop_factory("uvloop")


def test_auto_is_asyncio_where_uvloop_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop_factory("auto") is asyncio.new_event_loop


def test_uvloop_without_uvloop_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with pytest.raises(StartError) as missing:
        loop_factory("uvloop")
    text = str(missing.value)
    assert text.startswith("cannot use --loop uvloop: ")
    assert "pip install 'echo-async[uvloop]'" in text
    assert "\n" not in text
    assert isinstance(missing.value, EchoError)


def test_each_call_of_a_factory_makes_a_loop_of_its_own() -> None:
    make = loop_factory("uvloop")
    first, second = make(), make()
    try:
        assert first is not second
    finally:
        first.close()
        second.close()
