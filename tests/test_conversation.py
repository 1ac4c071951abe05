"""The wire protocol of each mode, without an event loop or a socket.

Every input is fed as a whole, byte by byte and in chunks of 20 bytes, with and without trailing data, and must
give the same outcome. Hypothesis then searches for a split that makes a difference.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make_conversation

import echo_async.wire.conversation
from echo_async.config import Mode
from echo_async.wire.conversation import LARGE_CHUNK, Conversation

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
        return cls(
            reply=reply,
            messages=conversation.messages,
            incomplete=conversation.incomplete,
            discarded=conversation.discarded,
            finished=conversation.finished,
            too_long=conversation.too_long,
        )


def run_conversation(mode: Mode, chunks: Iterable[bytes], limit: int = LIMIT) -> Outcome:
    conversation = make_conversation(mode, limit)
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


@pytest.mark.parametrize("size", [1, 19, 20, 21, 20_000])
def test_message_split_anywhere_is_echoed_unchanged(size: int) -> None:
    for message in MESSAGES:
        chunks = list(split_evenly(message, size))
        assert run_conversation("message", chunks) == Outcome(reply=message, messages=1, finished=True)
        assert run_conversation("stream", chunks) == Outcome(reply=message, messages=1)
        assert run_conversation("raw", chunks) == Outcome(reply=message, messages=0)


@pytest.mark.parametrize("size", [1, 20, 20_000])
def test_bytes_after_a_message_depend_on_the_mode(size: int) -> None:
    for message in MESSAGES:
        chunks = list(split_evenly(message + b"trailing", size))
        assert run_conversation("message", chunks) == Outcome(reply=message, messages=1, discarded=8, finished=True)
        assert run_conversation("stream", chunks) == Outcome(reply=message, messages=1, incomplete=8)
        assert run_conversation("raw", chunks) == Outcome(reply=message + b"trailing", messages=0)


@pytest.mark.parametrize("size", [1, 20, 20_000])
def test_message_without_newline_is_not_answered(size: int) -> None:
    for incomplete in (message[:-1] for message in MESSAGES):
        chunks = list(split_evenly(incomplete, size))
        assert run_conversation("message", chunks) == Outcome(reply=b"", messages=0, incomplete=len(incomplete))
        assert run_conversation("stream", chunks) == Outcome(reply=b"", messages=0, incomplete=len(incomplete))
        assert run_conversation("raw", chunks) == Outcome(reply=incomplete, messages=0)


def test_stream_replies_as_soon_as_the_newline_arrives() -> None:
    conversation = make_conversation("stream", LIMIT)
    assert conversation.receive(b"on") == b""
    assert conversation.receive(b"e") == b""
    assert conversation.receive(b"\ntwo\nth") == b"one\ntwo\n"
    assert conversation.receive(b"ree\n") == b"three\n"


@pytest.mark.parametrize("mode", MODES)
def test_complete_message_is_returned_without_a_copy(mode: Mode) -> None:
    conversation = make_conversation(mode, LIMIT)
    message = b"Hola Server!\n"
    assert conversation.receive(message) is message


def test_stream_after_a_split_message_returns_without_a_copy() -> None:
    conversation = make_conversation("stream", LIMIT)
    feed(conversation, [b"in ", b"pieces\n"])
    several = b"one\ntwo\n"
    assert conversation.receive(several) is several
    assert conversation.messages == 3


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_large_message_is_returned_in_parts_without_a_copy(mode: Mode) -> None:
    chunks = [b"a" * LARGE_CHUNK, b"b" * LARGE_CHUNK, b"c\n"]
    conversation = make_conversation(mode, LIMIT)
    conversation.has_parts = True
    assert [conversation.receive(chunk) for chunk in chunks] == [b"", b"", b"c\n"]
    assert [id(part) for part in conversation.parts] == [id(chunk) for chunk in chunks[:2]]


@pytest.mark.parametrize("mode", ["message", "stream"])
@pytest.mark.parametrize("size", [20, 1000, LARGE_CHUNK])
def test_incomplete_message_uses_little_more_memory_than_its_size(mode: Mode, size: int) -> None:
    conversation = make_conversation(mode, LIMIT)
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


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_message_one_byte_over_the_limit_is_too_long(mode: Mode) -> None:
    for limit, size in product([1, 19, 20, 21, 64], [1, 20, 1000]):
        message = b"x" * limit + b"\n"
        assert run_conversation(mode, split_evenly(message[1:], size), limit).reply == message[1:]
        outcome = run_conversation(mode, split_evenly(message, size), limit)
        assert (outcome.reply, outcome.messages, outcome.finished, outcome.too_long) == (b"", 0, True, True)


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_message_without_newline_at_the_limit_is_too_long(mode: Mode) -> None:
    conversation = make_conversation(mode, 20)
    feed(conversation, [b"x" * 19])
    assert not conversation.too_long
    feed(conversation, [b"x"])  # the newline would be byte 21
    assert conversation.too_long
    assert conversation.finished


def test_raw_mode_has_no_message_limit() -> None:
    assert run_conversation("raw", [b"x" * 1000], limit=20) == Outcome(reply=b"x" * 1000, messages=0)


def test_long_chunk_completing_a_split_message_is_answered() -> None:
    sent = [b"beg", b"un\n" + b"small\n" * 100 + b"be", b"gun\n"]
    assert run_conversation("stream", sent, limit=6) == Outcome(reply=b"".join(sent), messages=102)


@pytest.mark.parametrize("mode", MODES)
def test_input_after_finish_is_discarded(mode: Mode) -> None:
    conversation = make_conversation(mode, LIMIT)
    conversation.end_input()
    assert conversation.receive(b"never\n") == b""
    assert conversation.receive(b"never") == b""
    assert conversation.received == conversation.discarded == 11
    assert conversation.incomplete == conversation.messages == 0


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_eof_within_a_message_keeps_the_incomplete_size(mode: Mode) -> None:
    conversation = make_conversation(mode, LIMIT)
    feed(conversation, [b"no newline"])
    conversation.end_input()
    assert Outcome.of(conversation, b"") == Outcome(reply=b"", messages=0, incomplete=10, finished=True)


@pytest.mark.parametrize("mode", MODES)
def test_eof_between_messages_leaves_nothing_incomplete(mode: Mode) -> None:
    conversation = make_conversation(mode, LIMIT)
    feed(conversation, [b"whole\n"])
    conversation.end_input()
    conversation.end_input()
    assert conversation.finished
    assert conversation.incomplete == 0


@pytest.mark.parametrize("mode", MODES)
def test_stop_before_the_first_byte_finishes_at_once(mode: Mode) -> None:
    conversation = make_conversation(mode, LIMIT)
    conversation.drain()
    assert conversation.finished
    assert feed(conversation, [b"late\n"]) == b""
    assert conversation.discarded == 5


@pytest.mark.parametrize("mode", ["message", "stream"])
@pytest.mark.parametrize("size", [1, 20])
def test_stop_within_a_message_answers_it_and_no_other(mode: Mode, size: int) -> None:
    conversation = make_conversation(mode, LIMIT)
    assert conversation.receive(b"first ") == b""
    conversation.drain()
    assert not conversation.finished
    reply = b"".join(conversation.receive(chunk) for chunk in split_evenly(b"part\nno\nmore", size))
    assert Outcome.of(conversation, reply) == Outcome(reply=b"first part\n", messages=1, discarded=7, finished=True)


def test_message_after_stop_can_be_too_long() -> None:
    conversation = make_conversation("stream", 20)
    feed(conversation, [b"first"])
    conversation.drain()
    assert conversation.receive(b"x" * 20) == b""
    assert conversation.finished
    assert conversation.too_long


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


def model(mode: Mode, sent: bytes, limit: int) -> tuple[bytes, int, bool, bool]:
    """Reference implementation, simple and slow: reply, messages, finished, too_long."""
    if mode == "raw":
        return sent, 0, False, False
    *messages, rest = sent.split(b"\n")
    reply = b""
    for count, message in enumerate(messages):
        if len(message) + 1 > limit:
            return reply, count, True, True
        reply += message + b"\n"
        if mode == "message":
            return reply, 1, True, False
    too_long = len(rest) + 1 > limit
    return reply, len(messages), too_long, too_long


@pytest.mark.parametrize("mode", MODES)
@given(sent=INPUTS, sizes=CHUNK_SIZES, limit=LIMITS)
def test_any_split_matches_the_reference_model(mode: Mode, sent: bytes, sizes: list[int], limit: int) -> None:
    outcome = run_conversation(mode, split(sent, sizes), limit)
    assert (outcome.reply, outcome.messages, outcome.finished, outcome.too_long) == model(mode, sent, limit)
    assert outcome == run_conversation(mode, [sent] if sent else [], limit)


@pytest.mark.parametrize("mode", MODES)
@given(sent=INPUTS, sizes=CHUNK_SIZES, limit=LIMITS, large=st.integers(1, 25), in_parts=st.booleans())
def test_any_chunk_kept_as_it_is_gives_the_same_outcome(
    mode: Mode, sent: bytes, sizes: list[int], limit: int, large: int, in_parts: bool
) -> None:
    """``large`` bytes take the place of the sizes from which on a chunk is kept, and newlines are found one by one."""
    conversation, reply = make_conversation(mode, limit), bytearray()
    conversation.has_parts = in_parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(echo_async.wire.conversation, "LARGE_CHUNK", large)
        patch.setattr(echo_async.wire.conversation, "LARGE_MESSAGE", large)
        for chunk in split(sent, sizes):
            last = conversation.receive(chunk)
            reply += b"".join([*conversation.parts, last])
            conversation.parts = ()
            assert len(reply) == conversation.answered
    assert Outcome.of(conversation, bytes(reply)) == run_conversation(mode, [sent] if sent else [], limit)


@pytest.mark.parametrize("mode", MODES)
@given(before=INPUTS, after=INPUTS, sizes=CHUNK_SIZES, limit=LIMITS)
def test_stop_before_any_split_gives_the_same_outcome(
    mode: Mode, before: bytes, after: bytes, sizes: list[int], limit: int
) -> None:
    def run_stopped(chunks: Iterable[bytes]) -> Outcome:
        conversation = make_conversation(mode, limit)
        reply = feed(conversation, [before])
        conversation.drain()
        return Outcome.of(conversation, reply + b"".join(map(conversation.receive, chunks)))

    assert run_stopped(split(after, sizes)) == run_stopped([after] if after else [])
