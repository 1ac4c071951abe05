"""All checks in their order, and the function that runs them."""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from time import perf_counter

from ..client.endpoint import Endpoint
from .content import check_bytes, check_joined, check_split
from .context import Context, Settings
from .datagrams import check_udp
from .endings import check_close, check_half_close, check_idle, check_incomplete, check_reset
from .identity import check_identity
from .load import check_backpressure, check_concurrent, check_slow
from .opening import check_connect, check_mode, check_tls
from .result import Failure, Outcome, Result, Skip


@dataclass(frozen=True, slots=True)
class Check:
    """One check: ``run`` returns what was seen, or raises :exc:`Failure` or :exc:`Skip`.

    ``expected`` is what a path that passes does. ``requires`` are the checks without which it would mean nothing.
    """

    name: str
    run: Callable[[Context], str]
    expected: str
    requires: tuple[str, ...] = ()


CHECKS = (
    Check("connect", check_connect, "a connection"),
    Check("tls", check_tls, "a TLS handshake with a valid certificate"),
    Check("mode", check_mode, "replies of an echo server"),
    Check("split", check_split, "one whole reply to a message in several packets"),
    Check("bytes", check_bytes, "every byte value and every size unchanged", ("split",)),
    Check("joined", check_joined, "replies in order to messages in one packet; in mode message, to the first"),
    Check("half-close", check_half_close, "all replies, then the end, after the end of input", ("split",)),
    Check("close", check_close, "the end after the reply, not a reset", ("joined",)),
    Check("incomplete", check_incomplete, "nothing or the same bytes, then the end", ("half-close",)),
    Check("concurrent", check_concurrent, "a reply to each of several clients at once", ("split",)),
    Check("reset", check_reset, "replies to all others after a client has reset its connection", ("concurrent",)),
    Check("slow", check_slow, "no delay of others over 100 ms by a slow client", ("concurrent", "reset")),
    Check("backpressure", check_backpressure, "all replies to a client that reads late", ("bytes", "joined", "reset")),
    Check("idle", check_idle, "a reply after silence", ("reset",)),
    Check("identity", check_identity, "a description of server and path", ("reset",)),
    Check("udp", check_udp, "datagrams unchanged, at most 5% lost", ("reset",)),
)
FIRST_CHECKS = ("connect", "tls", "mode")  # if one of them fails, there is nothing else to check


def run_checks(
    endpoint: Endpoint, settings: Settings, on_start: Callable[[str], object] = lambda name: None
) -> Generator[Result, None, None]:
    """Run the checks one after the other, and yield the result of each.

    Each reply has ``timeout`` seconds. A failure to connect, and a server that is no echo server, are the last result.
    ``on_start`` is called with the name of each check that begins. :exc:`~echo_async.ConfigError` if this process
    cannot open that many connections.
    """
    context = Context(endpoint, settings)
    is_selected = {"tls": endpoint.ssl is not None, "udp": settings.udp}
    unusable: set[str] = set()  # the checks that failed, and those that require one of them
    with contextlib.closing(context):
        for check in CHECKS:
            if is_selected.get(check.name, True):
                on_start(check.name)
                result = _run(check, context, unusable)
                yield result
                if result.result == "failed" and check.name in FIRST_CHECKS:
                    return


def _run(check: Check, context: Context, unusable: set[str]) -> Result:
    started = perf_counter()
    outcome: Outcome = "ok"
    seen, reason = "", None
    try:
        if missing := [each for each in check.requires if each in unusable]:
            unusable.add(check.name)
            raise Skip(f"requires {missing[0]}")
        seen = check.run(context)
    except Skip as skip:
        outcome, reason = "skipped", str(skip)
    except Failure as failure:
        unusable.add(check.name)
        outcome, seen, reason = "failed", failure.seen, failure.reason
    finally:
        context.close_connections()
    return Result(check.name, outcome, check.expected, seen, reason, perf_counter() - started)
