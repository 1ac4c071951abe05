"""Threads that do not keep the program running: what they serve is stopped when the interpreter exits.

At exit the interpreter waits for all threads but daemons, then calls the functions of :mod:`atexit`, then ends the
daemons wherever they are (CPython: Python/pylifecycle.c, ``Py_FinalizeEx``). So the threads here are daemons, which it
does not wait for, and a function of ``atexit`` stops them, so that none ends in the middle of a reply. A server stays
open as long as a thread of the program uses it.

A subinterpreter can refuse daemons. There the function is called before the interpreter waits for threads, as
:mod:`concurrent.futures` does it (Lib/threading.py, ``_register_atexit``).
"""

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from time import monotonic
from typing import TypeVar

EXIT_TIMEOUT = 1.0  # seconds for all threads to end when the interpreter exits

T = TypeVar("T")

_stop_functions: dict[threading.Thread, Callable[[], object]] = {}


def start_thread(run: Callable[[], object], name: str, *, stop: Callable[[], object] | None = None) -> threading.Thread:
    """Start a thread that calls ``run``. :exc:`RuntimeError` if the system has none.

    When the interpreter exits, ``stop`` is called to end it, unless it has ended. Without ``stop``, nothing waits
    for the thread.
    """
    target = run if stop is None else partial(_run_stoppable, run)
    thread = threading.Thread(target=target, name=name, daemon=_HAS_DAEMONS)
    if stop is not None:
        _stop_functions[thread] = stop
    try:
        thread.start()
    except BaseException:
        _stop_functions.pop(thread, None)
        raise
    return thread


def _run_stoppable(run: Callable[[], object]) -> None:
    """Call ``run`` in a thread that has to be stopped until it returns."""
    try:
        run()
    finally:
        _stop_functions.pop(threading.current_thread(), None)


def call_in_thread(function: Callable[[], T], name: str) -> Future[T]:
    """Call ``function`` in a thread, which delays neither closing an event loop nor the exit, as an executor's would.

    :exc:`RuntimeError` if the system has none.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    start_thread(partial(complete, future, function), name)
    return future


def complete(future: Future[T], function: Callable[[], T]) -> None:
    """Give ``future`` what ``function`` returns or raises."""
    try:
        result = function()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def start_resolver(resolve: Callable[[], T]) -> Future[T]:
    """Start ``resolve()``, which blocks while it asks the system's resolver. :exc:`OSError` if there is no thread."""
    try:
        return call_in_thread(resolve, "echo-async resolver")
    except RuntimeError as error:
        raise OSError(f"cannot resolve the host name: {error}; use an address") from error


def _stop_all() -> None:
    # In a child process that was forked no thread is alive: there is nothing to stop, and the sockets are its parent's.
    running = [(thread, stop) for thread, stop in list(_stop_functions.items()) if thread.is_alive()]
    for _, stop in running:
        stop()
    deadline = monotonic() + EXIT_TIMEOUT
    for thread, _ in running:
        thread.join(max(0.0, deadline - monotonic()))


def _has_daemons() -> bool:
    try:
        threading.Thread(name="", daemon=True)
    except RuntimeError:  # PyInterpreterConfig.allow_daemon_threads
        return False
    return True


_HAS_DAEMONS = _has_daemons()
(atexit.register if _HAS_DAEMONS else getattr(threading, "_register_atexit", atexit.register))(_stop_all)
