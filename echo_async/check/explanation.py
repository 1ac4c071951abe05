"""What was received instead of an echo, in words, and which behavior of a server or of the path usually explains it."""

from collections.abc import Callable, Sequence

from ..client.verifier import common_prefix, escape_bytes
from ..wire.proxy import V1_PREFIX, V2_SIGNATURE
from .connection import FLOOD

MAX_QUOTED = 24  # bytes


def describe(sent: bytes, received: bytes, ending: str) -> str:
    """Describe ``received``, which differs from ``sent``; ``ending`` is what came after it."""
    total = f"{len(sent):,} bytes"
    if not received:
        return f"nothing of {total}, then {ending}"
    if sent.startswith(received):
        return f"{len(received):,} of {total}, then {ending}"
    if sent.endswith(received):
        return f"the last {len(received):,} of {total}"
    start = common_prefix(sent, received)
    expected, seen = (quote(data[start:]) for data in (sent, received))
    return f"{len(received):,} instead of {total}, from byte {start:,} on {seen} instead of {expected}"


def quote(data: bytes) -> str:
    """Return the beginning of ``data`` for a terminal."""
    return f'"{escape_bytes(data[:MAX_QUOTED])}"' + "..." * (len(data) > MAX_QUOTED)


def _is_recoded(sent: bytes, received: bytes) -> bool:
    if (replacement := "\ufffd".encode()) in received and replacement not in sent:
        return True
    return received in (sent.decode("utf-8", "ignore").encode(), sent.decode("latin-1").encode())


EXPLANATIONS: Sequence[tuple[Callable[[bytes, bytes], bool], str]] = (
    (
        lambda sent, received: received == sent.replace(b"\r", b""),
        "something removes carriage returns, as strip() and text mode do",
    ),
    (
        lambda sent, received: received.startswith((V1_PREFIX, V2_SIGNATURE[: len(received)])),
        "a proxy sends a PROXY header, which the server takes for a message",
    ),
    (_is_recoded, "something decodes the bytes as text and encodes them again"),
    (lambda sent, received: received.startswith(sent), "something adds to the replies, or sends them twice"),
    (
        lambda sent, received: sent.endswith(received),
        "the reply is the last chunk that was read instead of the whole message",
    ),
    (
        lambda sent, received: sorted(sent.splitlines()) == sorted(received.splitlines()),
        "replies are sent by several tasks or connections, in no order",
    ),
)
"""Conditions on what was sent and received, and what each means. The first one that holds applies."""


def explain(sent: bytes, received: bytes, ending: str, truncated: str) -> str:
    """Return the usual reason of a reply that differs from what was sent.

    ``ending`` is what came after it; ``truncated`` is the reason of a reply of which the end, or all, is missing.
    """
    if ending == FLOOD:
        return "the server sends by itself, without end: is it an echo server?"
    if sent.startswith(received):
        return truncated
    for is_met, reason in EXPLANATIONS:
        if is_met(sent, received):
            return reason
    return "the server sends something else than it receives: is it an echo server, without a greeting?"
