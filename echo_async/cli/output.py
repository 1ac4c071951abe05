"""The output of the client: replies on stdout, unchanged; errors and steps on stderr.

Replies are escaped if stdout is a terminal, and always those of ``identify`` mode, which are no echoes.
If stdout is closed by its reader, the command ends without an error.
"""

import os
import select
import sys
from typing import TYPE_CHECKING, Any

from ..client.verifier import escape_bytes
from ..errors import EchoError, describe_error, failure_kind
from ..stdio import discard_output, print_error, print_to_stderr
from ..wire.text import escape_json

if TYPE_CHECKING:
    from ..client.datagram_tracker import Reply


def _datagram_marks(reply: "Reply") -> dict[str, bool]:
    return {"late": reply.is_late, "duplicated": reply.seconds is None, "reordered": reply.is_reordered}


class OutputClosed(Exception):
    """The reader of stdout has closed it."""


class Output:
    """Prints replies as lines. ``number`` is that of the last message whose result was printed.

    ``is_identity`` is whether they are those of ``identify`` mode.
    """

    def __init__(self, *, quiet: bool, verbose: bool, is_identity: bool = False) -> None:
        self._quiet, self._verbose, self._is_identity = quiet, verbose, is_identity
        self._stdout = sys.stdout
        self._is_terminal = self._stdout is not None and self._stdout.isatty()
        self.number = 0
        self._is_writing = self._is_interrupted = False

    def print_replies(self, data: bytes, seconds: float) -> None:
        """Print complete replies that arrived ``seconds`` after their messages were sent."""
        if not data:
            return
        self._write(self._format_replies(data, seconds))
        if self._verbose:
            for number, line in enumerate(data.split(b"\n")[:-1], self.number + 1):
                print_to_stderr(f"* reply {number}: {len(line) + 1} bytes after {1e3 * seconds:.3f} ms")
        self.number += len(data) - len(data.replace(b"\n", b""))

    def print_failure(self, error: EchoError, what: str = "message") -> None:
        """Print that the next message failed; the text names it as ``what``, or does not if that is empty."""
        self.number += 1
        self.print_numbered_failure(error, self.number, what)

    def print_numbered_failure(self, error: EchoError, number: int | None, what: str = "datagram") -> None:
        """Print that a datagram is lost, or a received one corrupted: then ``number`` is None."""
        self.print_error(str(error) if number is None or not what else f"{what} {number}: {error}")

    def print_heading(self, text: str) -> None:
        if not self._quiet:
            self._write_line(text)

    def print_round_trip(self, name: str, message: bytes, seconds: float) -> None:
        self.number += 1
        self.print_heading(f"{len(message)} bytes from {name}: seq={self.number} time={1e3 * seconds:.3f} ms")

    def print_datagram(self, name: str, size: int, reply: "Reply") -> None:
        time = "" if reply.seconds is None else f" time={1e3 * reply.seconds:.3f} ms"
        marks = "".join(f" ({mark})" for mark, is_set in _datagram_marks(reply).items() if is_set)
        self.print_heading(f"{size} bytes from {name}: seq={reply.number}{time}{marks}")

    def print_summary(self, text: str, counts: dict[str, int] | None = None) -> None:
        """Print a summary. ``counts`` are the counters in it that are reported as JSON as well."""
        self._write_line(text)

    def print_error(self, text: str, kind: str = "error") -> None:
        if not self._quiet:
            print_error(text, kind)

    def interrupt(self) -> None:
        """Handle Ctrl-C: raise :exc:`KeyboardInterrupt` if a write to stdout blocks, now or later."""
        self._is_interrupted = True
        if self._is_writing and self._would_block():
            raise KeyboardInterrupt

    def _would_block(self) -> bool:
        try:
            return not select.select([], [self._stdout.fileno()], [], 0)[1]
        except (OSError, ValueError):
            return False

    def _format_replies(self, data: bytes, seconds: float) -> bytes:
        if not self._is_terminal and not self._is_identity:
            return data
        escaped = escape_json if self._is_identity else escape_bytes
        text = "".join(f"{escaped(line)}\n" for line in data.split(b"\n")[:-1])
        return text.encode(self._stdout.encoding if self._is_terminal else "utf-8", "backslashreplace")

    def _write_line(self, text: str) -> None:
        self._write(f"{text}\n".encode("utf-8", "backslashreplace"))

    def _write(self, data: bytes) -> None:
        if self._stdout is None:
            return
        try:
            self._is_writing = True
            if self._is_interrupted and self._would_block():
                raise KeyboardInterrupt
            self._write_to_descriptor(memoryview(data))
        except BrokenPipeError as error:
            raise OutputClosed from error
        except OSError as error:
            discard_output(self._stdout)
            raise EchoError(f"cannot write to stdout: {describe_error(error)}") from error
        except KeyboardInterrupt:
            discard_output(self._stdout)
            raise
        finally:
            self._is_writing = False

    def _write_to_descriptor(self, data: memoryview) -> None:
        """Write without a buffer: after an error, a buffer does not report how much it has written."""
        descriptor = self._stdout.fileno()
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # another process that shares stdout made it non-blocking
                select.select([], [descriptor], [])


class JsonOutput(Output):
    """Prints each reply and each failure as a JSON object; a reply of ``identify`` mode as its ``identity``."""

    def print_numbered_failure(self, error: EchoError, number: int | None, what: str = "datagram") -> None:
        super().print_numbered_failure(error, number, what)
        details = {"kind": failure_kind(error), "message": str(error)}
        self._write_line(_to_json({"seq": number, "ok": False, "error": details}))

    def print_heading(self, text: str) -> None:
        pass

    def print_round_trip(self, name: str, message: bytes, seconds: float) -> None:
        self.print_replies(message, seconds)

    def print_datagram(self, name: str, size: int, reply: "Reply") -> None:
        seconds = None if reply.seconds is None else round(reply.seconds, 6)
        facts = {"seq": reply.number, "bytes": size, "seconds": seconds, "ok": not reply.is_late}
        self._write_line(_to_json(facts | _datagram_marks(reply)))

    def print_summary(self, text: str, counts: dict[str, int] | None = None) -> None:
        """Print the summary to stderr: stdout has JSON objects only."""
        if not self._quiet:
            print_to_stderr(text)
        if counts is not None:
            self._write_line(_to_json(counts))

    def _format_replies(self, data: bytes, seconds: float) -> bytes:
        import json

        objects = []
        for number, line in enumerate(data.split(b"\n")[:-1], self.number + 1):
            reply: dict[str, object] = {"seq": number, "bytes": len(line) + 1}
            if self._is_identity:
                reply["identity"] = json.loads(line)
            else:
                reply["text"] = line.decode("utf-8", "backslashreplace")
            reply |= {"seconds": round(seconds, 6), "ok": True}
            objects.append(json.dumps(reply) + "\n")
        return "".join(objects).encode()


def _to_json(facts: dict[str, Any]) -> str:
    import json  # which only --json needs

    return json.dumps(facts)
