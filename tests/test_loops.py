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


def test_loop_asyncio_is_the_loop_of_asyncio() -> None:
    assert module_of_the_loop("asyncio").startswith("asyncio.")


def test_loop_uvloop_is_the_loop_of_uvloop() -> None:
    assert module_of_the_loop("uvloop").startswith("uvloop")


def test_loop_auto_selects_uvloop_if_installed() -> None:
    assert loop_factory("auto") is loop_factory("uvloop")
    assert loop_factory() is loop_factory("uvloop")


def test_loop_auto_without_uvloop_selects_asyncio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop_factory("auto") is asyncio.new_event_loop


def test_loop_uvloop_not_installed_raises_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with pytest.raises(StartError) as missing:
        loop_factory("uvloop")
    text = str(missing.value)
    assert text.startswith("cannot use --loop uvloop: ")
    assert "pip install 'echo-async[uvloop]'" in text
    assert "\n" not in text
    assert isinstance(missing.value, EchoError)


def test_loop_factory_creates_a_new_loop_per_call() -> None:
    make = loop_factory("uvloop")
    first, second = make(), make()
    try:
        assert first is not second
    finally:
        first.close()
        second.close()
