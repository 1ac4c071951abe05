"""The escaping of text from the network, without IO, so that no client can forge log lines or control a terminal."""

MAX_EXCERPT = 80  # characters of a message in a log line
JOINERS = "\u200c\u200d"  # zero-width joiners: emoji and several scripts need them, and they are harmless


def escape(text: str) -> str:
    r"""Escape every character that could control a terminal or forge a log line.

    Control characters (C0, C1, DEL), newlines, ANSI sequences, bidirectional overrides, lone surrogates and
    all others that are not :meth:`str.isprintable` become ``\xNN`` or ``\uNNNN``. A backslash is doubled, so
    that the result is unambiguous.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_escape_character, text))


def _escape_character(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable() or character in JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def escape_json(line: bytes) -> str:
    r"""Escape the same characters in a line of valid JSON, which stays the same JSON: they become ``\uNNNN``."""
    import json

    text = line.decode("utf-8", "surrogatepass").replace("\t", " ").replace("\r", " ")  # outside of strings
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def excerpt(message: bytes) -> str:
    """Return the text of a message for a log line: without newline, escaped, truncated to 80 characters.

    Bytes that are not valid UTF-8 become ``\\xNN``. Only the part of the message that fits is processed.
    """
    head = message[: 4 * MAX_EXCERPT + 4]  # UTF-8 has at most 4 bytes per character
    text = ""
    for character in head.removesuffix(b"\n").decode("utf-8", "surrogateescape"):
        is_invalid_byte = "\udc80" <= character <= "\udcff"  # by surrogateescape
        character = f"\\x{ord(character) - 0xDC00:02x}" if is_invalid_byte else _escape_character(character)
        if len(text) + len(character) > MAX_EXCERPT:
            return text + "..."
        text += character
    return text
