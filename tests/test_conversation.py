"""The wire protocol of each mode, without an event loop or a socket.

Every input, in chunks of any size, must have the outcome of a simple model.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import expected_replies

import echo_async.wire.conversation
from echo_async.config import Mode
from echo_async.wire.conversation import LARGE_CHUNK, Conversation
from echo_async.wire.conversation import MODES as CONVERSATIONS

MODES: tuple[Mode, ...] = ("message", "stream", "raw")
LIMIT = 1_048_576


def split_evenly(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def feed(conversation: Conversation, chunks: Iterable[bytes]) -> bytes:
    """Feed the chunks that are not empty; return all replies joined."""
    reply = b"".join(conversation.receive(chunk) for chunk in chunks if chunk)
    assert len(reply) == conversation.answered
    assert conversation.received == conversation.answered + conversation.incomplete + conversation.discarded
    return reply


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The observable state of a conversation, and its replies."""

    reply: bytes
    messages: int
    incomplete: int = 0
    discarded: int = 0
    finished: bool = False
    too_long: bool = False

    @classmethod
    def of(cls, conversation: Conversation, reply: bytes) -> Outcome:
        state = {each.name: getattr(conversation, each.name) for each in fields(cls) if each.name != "reply"}
        return cls(reply=reply, **state)


def run_conversation(mode: Mode, chunks: Iterable[bytes], limit: int = LIMIT) -> Outcome:
    conversation = CONVERSATIONS[mode](limit)
    return Outcome.of(conversation, feed(conversation, chunks))


BOUNDARY_SIZES = [b"x" * (size - 1) + b"\n" for size in (1, 19, 20, 21, 40, 41, 10_000)]
SPLIT_CHARACTERS = [(" " * pad + character + " Hola\n").encode() for pad in range(17, 22) for character in "ñ€😀"]
UNUSUAL_BYTES = [
    b"\r\n",
    b"carriage return\r alone\n",
    b"\0\n",
    b"nul \0 in the middle\n",
    b"\xff\xfe\n",  # never valid in UTF-8
    b"\xc0\x8a\xe0\x80\x8a\n",  # overlong encodings of a newline
    b"\xed\xa0\x80\n",  # a lone surrogate
    b"\xf0\x9f\x98\n",  # a truncated emoji
    b"\x1b[2J\x9b31m\xe2\x80\xae\xe2\x80\xa8\xc2\x85\n",  # other line separators
]
MESSAGES = [*BOUNDARY_SIZES, *SPLIT_CHARACTERS, *UNUSUAL_BYTES]


def model(mode: Mode, sent: bytes, limit: int) -> Outcome:
    """Reference implementation, simple and slow."""
    reply = expected_replies(mode, sent, limit)
    if mode == "raw":
        return Outcome(reply=reply, messages=0)
    messages, rest = reply.count(b"\n"), sent[len(reply) :]
    if mode == "message" and messages:
        return Outcome(reply=reply, messages=1, discarded=len(rest), finished=True)
    if len(rest.partition(b"\n")[0]) + 1 > limit:
        discarded = len(rest) - limit
        return Outcome(
            reply=reply, messages=messages, incomplete=limit, discarded=discarded, finished=True, too_long=True
        )
    return Outcome(reply=reply, messages=messages, incomplete=len(rest))


@pytest.mark.parametrize("mode", MODES)
def test_message_split_anywhere_is_echoed_unchanged(mode: Mode) -> None:
    for message, size in product(MESSAGES, (1, 19, 20, 21, 20_000)):
        for sent in (message, message + b"trailing", message[:-1]):
            assert run_conversation(mode, split_evenly(sent, size)) == model(mode, sent, LIMIT)


def test_stream_replies_as_soon_as_the_newline_arrives() -> None:
    conversation = CONVERSATIONS["stream"](LIMIT)
    assert conversation.receive(b"on") == b""
    assert conversation.receive(b"e") == b""
    assert conversation.receive(b"\ntwo\nth") == b"one\ntwo\n"
    assert conversation.receive(b"ree\n") == b"three\n"


def test_complete_messages_are_returned_without_a_copy() -> None:
    message, several = b"Hola Server!\n", b"one\ntwo\n"
    for mode in MODES:
        assert CONVERSATIONS[mode](LIMIT).receive(message) is message
    conversation = CONVERSATIONS["stream"](LIMIT)
    feed(conversation, [b"in ", b"pieces\n"])
    assert conversation.receive(several) is several
    assert conversation.messages == 3


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_large_message_is_returned_in_parts_without_a_copy(mode: Mode) -> None:
    chunks = [b"a" * LARGE_CHUNK, b"b" * LARGE_CHUNK, b"c\n"]
    conversation = CONVERSATIONS[mode](LIMIT)
    conversation.has_parts = True
    assert [conversation.receive(chunk) for chunk in chunks] == [b"", b"", b"c\n"]
    assert [id(part) for part in conversation.parts] == [id(chunk) for chunk in chunks[:2]]


@pytest.mark.parametrize("mode", ["message", "stream"])
@pytest.mark.parametrize("size", [20, 1000, LARGE_CHUNK])
def test_incomplete_message_uses_little_more_memory_than_its_size(mode: Mode, size: int) -> None:
    conversation = CONVERSATIONS[mode](LIMIT)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(1_000_000 // size):
            conversation.receive(bytes(size))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert conversation.incomplete <= after - before <= 1.2 * conversation.incomplete


def test_messages_of_any_size_in_one_chunk_are_counted() -> None:
    """Newlines are counted in one way among short messages, and in another among long ones."""
    messages = [b"x" * 5000 + b"\n", b"x" * 100_000 + b"\n", b"\n", b"short\n" * 20_000, b"x" * 5000 + b"\n"]
    for some in (messages, messages[:2], messages[2:], messages[3:]):
        sent = b"".join(some)
        assert run_conversation("stream", [sent]) == Outcome(reply=sent, messages=sent.count(b"\n"))


@pytest.mark.parametrize("mode", MODES)
def test_message_one_byte_over_the_limit_is_too_long(mode: Mode) -> None:
    for limit, size in product([1, 19, 20, 21, 64], [1, 20, 1000]):
        for sent in (limit * b"x" + b"\n", limit * b"x", (limit - 1) * b"x" + b"\n", (limit - 1) * b"x"):
            assert run_conversation(mode, split_evenly(sent, size), limit) == model(mode, sent, limit)


def test_long_chunk_completing_a_split_message_is_answered() -> None:
    sent = [b"beg", b"un\n" + b"small\n" * 100 + b"be", b"gun\n"]
    assert run_conversation("stream", sent, limit=6) == Outcome(reply=b"".join(sent), messages=102)


@pytest.mark.parametrize("mode", MODES)
def test_input_after_its_end_is_discarded(mode: Mode) -> None:
    for sent in (b"", b"whole\n", b"incomplete"):
        conversation = CONVERSATIONS[mode](LIMIT)
        reply = feed(conversation, [sent])
        conversation.end_input()
        conversation.end_input()
        assert conversation.receive(b"never\n") == conversation.receive(b"never") == b""
        assert Outcome.of(conversation, reply) == replace(model(mode, sent, LIMIT), finished=True, discarded=11)


# Short messages of few byte values, so that newlines, limits and chunk boundaries coincide often.
PARTS = st.sampled_from([b"\n", b"a", b"\r\n", b"bc\n", b"\0\xff", "ñ😀\n".encode(), b"d" * 20])
INPUTS = st.lists(PARTS).map(b"".join)
CHUNK_SIZES = st.lists(st.integers(1, 25))
LIMITS = st.integers(1, 40) | st.just(LIMIT)


def split(data: bytes, sizes: Iterable[int]) -> list[bytes]:
    chunks = []
    for size in sizes:
        chunks.append(data[:size])
        data = data[size:]
    return [chunk for chunk in [*chunks, data] if chunk]


@pytest.mark.parametrize("mode", MODES)
@given(sent=INPUTS, sizes=CHUNK_SIZES, limit=LIMITS, large=st.integers(1, 25), in_parts=st.booleans())
def test_any_split_matches_the_reference_model(
    mode: Mode, sent: bytes, sizes: list[int], limit: int, large: int, in_parts: bool
) -> None:
    """``large`` bytes take the place of the sizes from which on a chunk is kept, and newlines are found one by one."""
    conversation, reply = CONVERSATIONS[mode](limit), bytearray()
    conversation.has_parts = in_parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(echo_async.wire.conversation, "LARGE_CHUNK", large)
        patch.setattr(echo_async.wire.conversation, "LARGE_MESSAGE", large)
        for chunk in split(sent, sizes):
            last = conversation.receive(chunk)
            reply += b"".join([*conversation.parts, last])
            conversation.parts = ()
            assert len(reply) == conversation.answered
    assert conversation.received == conversation.answered + conversation.incomplete + conversation.discarded
    assert Outcome.of(conversation, bytes(reply)) == model(mode, sent, limit)


def stopped_model(mode: Mode, before: bytes, after: bytes, limit: int) -> Outcome:
    """A stop answers the message that has begun, and no other."""
    outcome = model(mode, before, limit)
    if outcome.finished or not outcome.incomplete:
        return replace(outcome, discarded=outcome.discarded + len(after), finished=True)
    last = model("message", before[len(outcome.reply) :] + after, limit)
    return replace(last, reply=outcome.reply + last.reply, messages=outcome.messages + last.messages)


@pytest.mark.parametrize("mode", MODES)
@given(before=INPUTS, after=INPUTS, sizes=CHUNK_SIZES, limit=LIMITS)
@example(before=b"", after=b"late\n", sizes=[], limit=LIMIT)
@example(before=b"first ", after=b"part\nno\nmore", sizes=[20], limit=LIMIT)
@example(before=b"first", after=b"x" * 20, sizes=[], limit=20)
def test_stop_answers_the_incomplete_message_and_no_other(
    mode: Mode, before: bytes, after: bytes, sizes: list[int], limit: int
) -> None:
    conversation = CONVERSATIONS[mode](limit)
    reply = feed(conversation, [before])
    conversation.drain()
    reply += b"".join(map(conversation.receive, split(after, sizes)))
    assert Outcome.of(conversation, reply) == stopped_model(mode, before, after, limit)
