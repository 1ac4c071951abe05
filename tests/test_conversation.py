"""The wire rules of each mode, without a loop or a socket.

Every case is fed whole, byte by byte, in pieces of 20 bytes and with trailing data, and has to come out
the same; hypothesis then looks for a split that makes a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_async.config import Mode
from echo_async.conversation import Conversation, conversation

MODES: tuple[Mode, ...] = ("message", "stream", "raw")
LIMIT = 1_048_576


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def feed(talk: Conversation, reads: Iterable[bytes]) -> bytes:
    """All that is answered to what each read brought; no read is empty, as in life."""
    reply = b"".join(talk.receive(read) for read in reads if read)
    assert len(reply) == talk.answered
    assert talk.received == talk.answered + talk.incomplete + talk.discarded
    return reply


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that can be told of a conversation from outside."""

    reply: bytes
    messages: int
    incomplete: int = 0
    discarded: int = 0
    finished: bool = False
    too_long: bool = False

    @classmethod
    def of(cls, talk: Conversation, reply: bytes) -> Outcome:
        return cls(
            reply=reply,
            messages=talk.messages,
            incomplete=talk.incomplete,
            discarded=talk.discarded,
            finished=talk.finished,
            too_long=talk.too_long,
        )


def outcome(mode: Mode, reads: Iterable[bytes], limit: int = LIMIT) -> Outcome:
    talk = conversation(mode, limit)
    return Outcome.of(talk, feed(talk, reads))


EDGES = [b"x" * (size - 1) + b"\n" for size in (1, 19, 20, 21, 40, 41, 10_000)]
TEXTS = [(" " * pad + character + " Hola\n").encode() for pad in range(17, 22) for character in "ñ€😀"]
BYTES = [
    b"\r\n",
    b"only a return\r and on\n",
    b"\0\n",
    b"nul \0 in the midst\n",
    b"\xff\xfe\n",  # in no text
    b"\xc0\x8a\xe0\x80\x8a\n",  # a newline written too long is none
    b"\xed\xa0\x80\n",  # half a surrogate pair
    b"\xf0\x9f\x98\n",  # an emoji that ends too soon
    b"\x1b[2J\x9b31m\xe2\x80\xae\xe2\x80\xa8\xc2\x85\n",  # no other character ends a line
]
MESSAGES = [*EDGES, *TEXTS, *BYTES]


def name(message: bytes) -> str:
    return f"{len(message)} bytes {ascii(message[-12:])[2:-1]}"


@pytest.mark.parametrize("message", MESSAGES, ids=name)
@pytest.mark.parametrize("size", [1, 19, 20, 21, 20_000])
def test_a_message_comes_back_byte_for_byte_whatever_pieces_it_comes_in(message: bytes, size: int) -> None:
    reads = list(pieces(message, size))
    assert outcome("message", reads) == Outcome(reply=message, messages=1, finished=True)
    assert outcome("stream", reads) == Outcome(reply=message, messages=1)
    assert outcome("raw", reads) == Outcome(reply=message, messages=0)


@pytest.mark.parametrize("message", MESSAGES, ids=name)
@pytest.mark.parametrize("size", [1, 20, 20_000])
def test_what_follows_a_message_means_something_else_in_each_mode(message: bytes, size: int) -> None:
    reads = list(pieces(message + b"trailing", size))
    assert outcome("message", reads) == Outcome(reply=message, messages=1, discarded=8, finished=True)
    assert outcome("stream", reads) == Outcome(reply=message, messages=1, incomplete=8)
    assert outcome("raw", reads) == Outcome(reply=message + b"trailing", messages=0)


@pytest.mark.parametrize("message", MESSAGES, ids=name)
@pytest.mark.parametrize("size", [1, 20, 20_000])
def test_nothing_is_answered_to_a_message_without_its_newline(message: bytes, size: int) -> None:
    begun = message[:-1]
    reads = list(pieces(begun, size))
    assert outcome("message", reads) == Outcome(reply=b"", messages=0, incomplete=len(begun))
    assert outcome("stream", reads) == Outcome(reply=b"", messages=0, incomplete=len(begun))
    assert outcome("raw", reads) == Outcome(reply=begun, messages=0)


@pytest.mark.parametrize("size", [1, 7, 20, 100_000])
def test_a_stream_answers_every_message_in_order(size: int) -> None:
    sent = b"".join(MESSAGES)
    assert outcome("stream", pieces(sent, size)) == Outcome(reply=sent, messages=len(MESSAGES))


def test_a_reply_is_there_as_soon_as_its_newline_is() -> None:
    talk = conversation("stream", LIMIT)
    assert talk.receive(b"on") == b""
    assert talk.receive(b"e") == b""
    assert talk.receive(b"\ntwo\nth") == b"one\ntwo\n"
    assert talk.receive(b"ree\n") == b"three\n"


@pytest.mark.parametrize("mode", MODES)
def test_a_message_that_arrives_whole_is_answered_with_the_object_that_came_in(mode: Mode) -> None:
    talk = conversation(mode, LIMIT)
    message = b"Hola Server!\n"
    assert talk.receive(message) is message


def test_a_stream_goes_on_answering_with_what_came_in_after_a_message_in_pieces() -> None:
    talk = conversation("stream", LIMIT)
    feed(talk, [b"in ", b"pieces\n"])
    several = b"one\ntwo\n"
    assert talk.receive(several) is several
    assert talk.messages == 3


@pytest.mark.parametrize("mode", ["message", "stream"])
@pytest.mark.parametrize("size", [1, 20, 1000])
@pytest.mark.parametrize("limit", [1, 19, 20, 21, 64])
def test_a_message_of_exactly_the_limit_is_answered(mode: Mode, size: int, limit: int) -> None:
    message = b"x" * (limit - 1) + b"\n"
    assert outcome(mode, pieces(message, size), limit).reply == message


@pytest.mark.parametrize("mode", ["message", "stream"])
@pytest.mark.parametrize("size", [1, 20, 1000])
@pytest.mark.parametrize("limit", [1, 19, 20, 21, 64])
def test_a_message_one_byte_over_the_limit_ends_the_conversation(mode: Mode, size: int, limit: int) -> None:
    message = b"x" * limit + b"\n"
    ended = outcome(mode, pieces(message, size), limit)
    assert (ended.reply, ended.messages, ended.finished, ended.too_long) == (b"", 0, True, True)


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_a_message_is_too_long_before_its_newline_comes(mode: Mode) -> None:
    talk = conversation(mode, 20)
    feed(talk, [b"x" * 19])
    assert not talk.too_long
    feed(talk, [b"x"])  # the newline would be byte 21
    assert talk.too_long
    assert talk.finished


def test_nothing_is_too_long_in_raw_mode() -> None:
    assert outcome("raw", [b"x" * 1000], limit=20) == Outcome(reply=b"x" * 1000, messages=0)


@pytest.mark.parametrize("size", [1, 20, 1000])
def test_the_limit_is_for_one_message_and_not_for_what_one_read_brings(size: int) -> None:
    sent = b"small\n" * 100
    assert outcome("stream", pieces(sent, size), limit=6) == Outcome(reply=sent, messages=100)


def test_a_message_in_pieces_and_many_small_ones_in_a_read_over_the_limit_are_answered() -> None:
    sent = [b"beg", b"un\n" + b"small\n" * 100 + b"be", b"gun\n"]
    assert outcome("stream", sent, limit=6) == Outcome(reply=b"".join(sent), messages=102)


@pytest.mark.parametrize("size", [1, 20, 1000])
def test_replies_before_a_message_that_is_too_long_are_still_given(size: int) -> None:
    sent = b"one\ntwo\n" + b"x" * 64 + b"\nthree\n"
    ended = outcome("stream", pieces(sent, size), limit=64)
    assert (ended.reply, ended.messages) == (b"one\ntwo\n", 2)
    assert ended.finished
    assert ended.too_long


def test_a_begun_message_that_grows_too_long_takes_no_later_one_with_it() -> None:
    ended = outcome("stream", [b"x" * 10, b"x" * 10 + b"\nnever\n"], limit=20)
    assert (ended.reply, ended.messages, ended.too_long) == (b"", 0, True)


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_a_message_that_is_too_long_is_counted_the_same_in_any_pieces(mode: Mode) -> None:
    sent = b"x" * 100 + b"\nmore\n"
    whole = outcome(mode, [sent], limit=20)
    assert outcome(mode, pieces(sent, 1), limit=20) == whole
    assert outcome(mode, pieces(sent, 20), limit=20) == whole


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_answered_after_the_end(mode: Mode) -> None:
    talk = conversation(mode, LIMIT)
    talk.finish()
    assert talk.receive(b"never\n") == b""
    assert talk.receive(b"never") == b""
    assert (talk.received, talk.discarded, talk.incomplete, talk.messages) == (11, 11, 0, 0)


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_the_end_of_input_in_mid_message_tells_how_much_was_lost(mode: Mode) -> None:
    talk = conversation(mode, LIMIT)
    feed(talk, [b"no newline"])
    talk.receive_eof()
    assert Outcome.of(talk, b"") == Outcome(reply=b"", messages=0, incomplete=10, finished=True)


@pytest.mark.parametrize("mode", MODES)
def test_the_end_of_input_between_messages_loses_nothing(mode: Mode) -> None:
    talk = conversation(mode, LIMIT)
    feed(talk, [b"whole\n"])
    talk.receive_eof()
    talk.receive_eof()
    assert talk.finished
    assert talk.incomplete == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_before_the_first_byte_finishes_at_once(mode: Mode) -> None:
    talk = conversation(mode, LIMIT)
    talk.stop()
    assert talk.finished
    assert feed(talk, [b"late\n"]) == b""
    assert talk.discarded == 5


def test_a_stop_between_messages_finishes_at_once() -> None:
    talk = conversation("stream", LIMIT)
    feed(talk, [b"beg", b"un\n"])
    talk.stop()
    assert Outcome.of(talk, b"") == Outcome(reply=b"", messages=1, finished=True)


@pytest.mark.parametrize("mode", ["message", "stream"])
@pytest.mark.parametrize("size", [1, 20])
def test_a_stop_in_mid_message_lets_it_be_finished_and_no_other(mode: Mode, size: int) -> None:
    talk = conversation(mode, LIMIT)
    assert talk.receive(b"begun, ") == b""
    talk.stop()
    assert not talk.finished
    reply = b"".join(talk.receive(piece) for piece in pieces(b"ended\nno\nmore", size))
    assert Outcome.of(talk, reply) == Outcome(reply=b"begun, ended\n", messages=1, discarded=7, finished=True)


def test_a_message_can_grow_too_long_after_a_stop() -> None:
    talk = conversation("stream", 20)
    feed(talk, [b"begun"])
    talk.stop()
    assert talk.receive(b"x" * 20) == b""
    assert talk.finished
    assert talk.too_long


# Any split. Short messages over few byte values, so that newlines, limits and cuts meet often.
SENT = st.lists(st.sampled_from([b"\n", b"a", b"\r\n", b"bc\n", b"\0\xff", "ñ😀\n".encode(), b"d" * 20])).map(b"".join)
CUTS = st.lists(st.integers(1, 25))
LIMITS = st.integers(1, 40) | st.just(LIMIT)


def cut(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    reads = []
    for size in cuts:
        reads.append(data[:size])
        data = data[size:]
    return [read for read in [*reads, data] if read]


def model(mode: Mode, sent: bytes, limit: int) -> tuple[bytes, int, bool, bool]:
    """The rules once more, slowly: reply, messages, finished, too_long."""
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
@given(sent=SENT, cuts=CUTS, limit=LIMITS)
def test_any_messages_in_any_split_give_what_the_rules_say(
    mode: Mode, sent: bytes, cuts: list[int], limit: int
) -> None:
    ended = outcome(mode, cut(sent, cuts), limit)
    assert (ended.reply, ended.messages, ended.finished, ended.too_long) == model(mode, sent, limit)


@pytest.mark.parametrize("mode", MODES)
@given(sent=SENT, cuts=CUTS, limit=LIMITS)
def test_any_split_ends_as_the_whole_does(mode: Mode, sent: bytes, cuts: list[int], limit: int) -> None:
    assert outcome(mode, cut(sent, cuts), limit) == outcome(mode, [sent], limit)


@pytest.mark.parametrize("mode", MODES)
@given(before=SENT, after=SENT, cuts=CUTS, limit=LIMITS)
def test_a_stop_is_the_same_in_any_split(mode: Mode, before: bytes, after: bytes, cuts: list[int], limit: int) -> None:
    def stopped(reads: Iterable[bytes]) -> Outcome:
        talk = conversation(mode, limit)
        reply = feed(talk, [before])
        talk.stop()
        return Outcome.of(talk, reply + b"".join(map(talk.receive, reads)))

    assert stopped(cut(after, cuts)) == stopped([after] if after else [])
