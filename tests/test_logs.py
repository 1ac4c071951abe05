"""Log output: whatever a client sends becomes one printable line."""

from __future__ import annotations

import io
import json
import os
import re
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_async import ServerConfig
from echo_async.engines.connection import Connection
from echo_async.engines.context import ServerContext, Slot
from echo_async.logs import LogFormat, access_log, configure, log
from echo_async.wire.text import escape, excerpt


def test_escape_replaces_what_is_not_printable() -> None:
    for text, shown in (
        ("\n", r"\n"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b31m", r"\x9b31m"),  # C1: ESC [ as one character
        ("\u202e", r"\u202e"),  # right-to-left override
        ("\udcff", r"\udcff"),
        ("\U000e0001", r"\U000e0001"),
        (r"\x1b", r"\\x1b"),  # text that looks escaped
        *((each, each) for each in ("", "ñandú €", "😀", "日本語", "👩\u200d👧", "'\"%s {} $(x)")),
    ):
        assert escape(f"before {text} after") == f"before {shown} after"


def test_excerpt_is_escaped_and_without_newline() -> None:
    for message, shown in (
        ("ñandú 😀\n".encode(), "ñandú 😀"),
        (b"\n", ""),
        (b"\r\n", r"\r"),
        (b"one\ntwo\n", r"one\ntwo"),
        (b"\xff\xfe\n", r"\xff\xfe"),
        (b"\xc0\x80", r"\xc0\x80"),
        ("ñ".encode()[:1] + b"\n", r"\xc3"),
    ):
        assert excerpt(message) == shown


def test_excerpt_is_truncated_to_80_characters() -> None:
    for character in ("x", "ñ", "€", "😀"):
        assert excerpt((character * 80 + "\n").encode()) == character * 80
        assert excerpt((character * 81 + "\n").encode()) == character * 80 + "..."
        assert excerpt((character * 10_000).encode()) == character * 80 + "..."
    for pad in range(74, 81):  # never within an escape
        shown = excerpt(b"x" * pad + b"\x1b" + b"x" * 80)
        assert shown.removesuffix("...").rstrip("x") in ("", "x" * pad + r"\x1b")
        assert len(shown) <= 83


ANY_TEXT = st.text(st.characters(codec=None))  # including lone surrogates


def is_one_printable_line(text: str) -> bool:
    return text.replace("\u200c", "").replace("\u200d", "").isprintable() and len(text.splitlines()) <= 1


@given(ANY_TEXT)
def test_escape_of_any_text_is_one_line_and_reversible(text: str) -> None:
    escape_sequence = re.compile(r"\\(?:\\|[abfnrtv]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
    escaped = escape(text)
    restored = escape_sequence.sub(lambda match: match[0].encode("ascii").decode("unicode_escape"), escaped)
    assert restored == text
    assert is_one_printable_line(escaped)


@given(st.binary(max_size=500) | ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass") * 9))
def test_excerpt_of_any_bytes_is_one_short_printable_line(message: bytes) -> None:
    shown = excerpt(message)
    assert is_one_printable_line(shown)
    assert len(shown) <= 83


Captured = pytest.CaptureFixture[str]


def log_a_message(format: LogFormat, message: bytes) -> None:
    configure("info", format)
    context = ServerContext(ServerConfig(mode="raw"))
    list(Connection(context, Slot(("127.0.0.1", 40000))).log_reply(message))


def test_text_format_has_time_level_peer_size_and_text(capsys: Captured) -> None:
    log_a_message("text", "¡Hola %s {}!\n".encode())
    line = capsys.readouterr().err
    assert line.endswith(" INFO 127.0.0.1:40000 14 bytes: ¡Hola %s {}!\n")
    assert datetime.fromisoformat(line[: line.index(" INFO")])


def test_json_format_has_the_fields_of_the_event(capsys: Captured) -> None:
    log_a_message("json", "¡Hola\x1b!\n".encode())
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert datetime.fromisoformat(entry.pop("time")).utcoffset() is not None
    assert entry == {
        "level": "info",
        "logger": "echo_async.access",
        "message": r"127.0.0.1:40000 9 bytes: ¡Hola\x1b!",
        "client": "127.0.0.1:40000",
        "listener": None,
        "bytes": 9,
        "text": r"¡Hola\x1b!",
    }


def test_json_format_includes_the_exception(capsys: Captured) -> None:
    configure("info", "json")
    log.error("operation failed", exc_info=ValueError("the reason"))
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["message"], entry["exception"]) == (
        "error",
        "operation failed",
        "ValueError: the reason",
    )


def test_records_below_the_level_are_not_written(capsys: Captured) -> None:
    configure("debug", "text")  # which the next call replaces
    configure("warning", "text")
    access_log.info("below")
    log.warning("at the level")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" WARNING at the level")


def test_log_to_closed_stderr_is_dropped(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    closed_stderr = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr("sys.stderr", closed_stderr)
        configure("info", "text")
    closed_stderr.close()
    log.info("dropped")
    assert capsys.readouterr() == ("", "")


def test_text_log_in_the_journal_has_priorities_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream is that of the journal if its device and inode are those of JOURNAL_STREAM."""
    for name in ("journal", "redirected"):
        with (tmp_path / name).open("w") as stream:
            monkeypatch.setattr("sys.stderr", stream)
            if name == "journal":
                status = os.fstat(stream.fileno())
                monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
            configure("debug", "text")
            log.debug("one")
            log.info("two")
            log.warning("three")
            log.error("four")
            log.critical("five")
    assert (tmp_path / "journal").read_text() == "<7>one\n<6>two\n<4>three\n<3>four\n<2>five\n"
    lines = (tmp_path / "redirected").read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} DEBUG one", lines[0])
