"""Event loops by name, created by a factory without a policy."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest
from support import TIMEOUT, count_events, run

import echo_async
from echo_async import StartError
from echo_async.loops import logged_errors, loop_factory


def loop_module(name: str) -> str:
    async def module() -> str:
        return type(asyncio.get_running_loop()).__module__

    return run(module, name)


def test_loop_by_name_or_factory_is_created() -> None:
    assert loop_factory("auto") is loop_factory("uvloop")
    assert loop_factory() is loop_factory("uvloop")
    assert loop_module("asyncio").startswith("asyncio.")
    assert loop_module("uvloop").startswith("uvloop")
    assert loop_factory("asyncio:new_event_loop") is asyncio.new_event_loop
    assert loop_module("asyncio.events:new_event_loop").startswith("asyncio.")


def test_loop_that_cannot_be_used_raises_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop_factory("auto") is asyncio.new_event_loop
    for name, reason in {
        "uvloop": "install it (pip install 'echo-async[uvloop]')",
        "missing_module:new_event_loop": "No module named 'missing_module'",
        "asyncio:missing": "module 'asyncio' has no attribute 'missing'",
        "asyncio:__all__": "'tuple' object is not callable",
        "asyncio:Event": "it returned <asyncio.locks.Event object at",
        "math:sqrt": "math.sqrt() takes exactly one argument (0 given)",
    }.items():
        with pytest.raises(StartError) as raised:
            loop_factory(name)
        text = str(raised.value)
        assert text.startswith(f"cannot use --loop {name}: ")
        assert reason in text
        assert text.endswith("use --loop auto")
        assert "\n" not in text


class IncompleteLoop(asyncio.SelectorEventLoop):
    """An event loop without a part that the server needs."""

    async def create_server(self, *args: object, **options: object) -> asyncio.Server:
        raise NotImplementedError


def test_loop_that_lacks_a_part_raises_start_error() -> None:
    async def serve() -> None:
        await echo_async.serve(port=0, engine="protocol")

    reason = "IncompleteLoop: NotImplementedError; use asyncio or uvloop$"
    with asyncio.Runner(loop_factory=IncompleteLoop) as runner, pytest.raises(StartError, match=reason):
        runner.run(serve())


def test_unhandled_errors_are_limited_lines_and_no_traceback(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Errors in destructors and threads of the command, with text that a client may have chosen."""

    class Name:
        def __repr__(self) -> str:
            return "client \x1b[31m\u202e\n" + 1000 * "x"

        def __del__(self) -> None:
            raise ValueError(self)

    def fail() -> None:
        raise SystemError("in a thread")

    hooks = sys.unraisablehook, threading.excepthook
    with asyncio.Runner() as runner, logged_errors(runner.get_loop()):
        for _ in range(10):
            Name()
            thread = threading.Thread(target=fail, name="echo-async test", daemon=True)
            thread.start()
            thread.join(TIMEOUT)
    assert (sys.unraisablehook, threading.excepthook) == hooks
    assert capfd.readouterr() == ("", "")
    assert sum(map(count_events, caplog.messages)) == 20
    assert all(line.isprintable() and line.startswith("unhandled error: in ") for line in caplog.messages)
    assert "client \\x1b[31m\\u202e\\n" in caplog.text
