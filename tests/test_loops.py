"""Event loops by name, created by a factory without a policy."""

from __future__ import annotations

import asyncio
import sys

import pytest
from support import run

from echo_async import EchoError, StartError
from echo_async.loops import LoopName, loop_factory


def loop_module(name: LoopName) -> str:
    async def module() -> str:
        return type(asyncio.get_running_loop()).__module__

    return run(module, name)


def test_loop_asyncio_is_the_loop_of_asyncio() -> None:
    assert loop_module("asyncio").startswith("asyncio.")


def test_loop_uvloop_is_the_loop_of_uvloop() -> None:
    assert loop_module("uvloop").startswith("uvloop")


def test_loop_auto_selects_uvloop_if_installed() -> None:
    assert loop_factory("auto") is loop_factory("uvloop")
    assert loop_factory() is loop_factory("uvloop")


def test_loop_auto_without_uvloop_selects_asyncio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop_factory("auto") is asyncio.new_event_loop


def test_loop_uvloop_not_installed_raises_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with pytest.raises(StartError) as raised:
        loop_factory("uvloop")
    text = str(raised.value)
    assert text.startswith("cannot use --loop uvloop: ")
    assert "pip install 'echo-async[uvloop]'" in text
    assert "\n" not in text
    assert isinstance(raised.value, EchoError)


def test_loop_factory_creates_a_new_loop_per_call() -> None:
    factory = loop_factory("uvloop")
    first, second = factory(), factory()
    try:
        assert first is not second
    finally:
        first.close()
        second.close()
