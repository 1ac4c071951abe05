"""What the command shows: replies on stdout and nothing else, as they came; errors and steps on stderr.

A terminal gets replies escaped. A reader of stdout who goes away ends the command quietly.
"""

from __future__ import annotations

import json
import os
import select
import sys

from ..errors import EchoError, describe_error
from ..messages import readable
from ..stdio import discard_output

__all__ = ["Interrupted", "JsonOutput", "Output", "OutputClosed"]


class OutputClosed(Exception):
    """Nobody reads stdout any more."""


class Interrupted(Exception):
    """Ctrl-C, while the reader of stdout held us up."""


class Output:
    """Replies as lines. ``number`` is that of the last message of which something was shown."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self._quiet, self._verbose = quiet, verbose
        # Either is None if it was closed before we started: its descriptor may be a connection by now.
        self._stdout, self._stderr = sys.stdout, sys.stderr
        self._terminal = self._stdout is not None and self._stdout.isatty()
        self.number = 0
        self._writing = self._interrupted = False

    def replies(self, data: bytes, seconds: float) -> None:
        """Show whole replies that came ``seconds`` after they were sent."""
        if not data:
            return
        self._show(data, seconds)
        if self._verbose:
            for number, line in enumerate(data.split(b"\n")[:-1], self.number + 1):
                self._say(f"* reply {number}: {len(line) + 1} bytes after {1e3 * seconds:.3f} ms")
        self.number += len(data) - len(data.replace(b"\n", b""))

    def failure(self, error: EchoError) -> None:
        """Tell what befell the next message."""
        self.number += 1
        self.error(f"message {self.number}: {error}")

    def unreachable(self, error: EchoError) -> None:
        """Tell why no more messages can be sent."""
        self.error(str(error))

    def interrupt(self) -> None:
        """Ctrl-C: do not wait any more, now or later, for whoever reads stdout and does not."""
        self._interrupted = True
        if self._writing and self._held_up():
            raise KeyboardInterrupt

    def _held_up(self) -> bool:
        try:
            return not select.select([], [self._stdout.fileno()], [], 0)[1]
        except (OSError, ValueError):
            return False

    def heading(self, text: str) -> None:
        """What is going to be pinged."""
        if not self._quiet:
            self._line(text)

    def round_trip(self, name: str, message: bytes, seconds: float) -> None:
        """Show one reply of a ping."""
        self.number += 1
        if not self._quiet:
            self._line(f"{len(message)} bytes from {name}: seq={self.number} time={1e3 * seconds:.3f} ms")

    def summary(self, lines: list[str]) -> None:
        """What became of all the messages of a ping."""
        self._line("\n".join(lines))

    def error(self, text: str, kind: str = "error") -> None:
        if not self._quiet:
            self._say(f"{kind}: {text}")

    def _show(self, data: bytes, seconds: float) -> None:
        self._write(self._for_terminal(data) if self._terminal else data)

    def _for_terminal(self, data: bytes) -> bytes:
        text = "".join(f"{readable(line)}\n" for line in data.split(b"\n")[:-1])
        return text.encode(self._stdout.encoding, "backslashreplace")

    def _line(self, text: str) -> None:
        self._write(f"{text}\n".encode("utf-8", "backslashreplace"))

    def _write(self, data: bytes) -> None:
        if self._stdout is None:
            return
        try:
            self._writing = True
            if self._interrupted and self._held_up():
                raise KeyboardInterrupt
            self._put(memoryview(data))
        except BrokenPipeError as error:
            raise OutputClosed from error
        except OSError as error:
            discard_output(self._stdout)
            raise EchoError(f"cannot write to stdout: {describe_error(error)}") from error
        except KeyboardInterrupt as error:
            discard_output(self._stdout)
            raise Interrupted from error
        finally:
            self._writing = False

    def _put(self, data: memoryview) -> None:
        """Past every buffer: each is one more that is not sure to say how much of ``data`` it has taken."""
        descriptor = self._stdout.fileno()
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # somebody else who has it made it so
                select.select([], [descriptor], [])

    def _say(self, text: str) -> None:
        if self._stderr is not None:
            try:
                print(text, file=self._stderr, flush=True)
            except (OSError, ValueError):
                discard_output(self._stderr)


class JsonOutput(Output):
    """Each reply, and each failure, as one JSON object."""

    def heading(self, text: str) -> None:
        pass

    def round_trip(self, name: str, message: bytes, seconds: float) -> None:
        self.replies(message, seconds)

    def summary(self, lines: list[str]) -> None:
        """On stderr: stdout has one object for each reply, and nothing else."""
        if not self._quiet:
            self._say("\n".join(lines))

    def failure(self, error: EchoError) -> None:
        super().failure(error)
        self._failed(error)

    def unreachable(self, error: EchoError) -> None:
        super().unreachable(error)
        self.number += 1
        self._failed(error)

    def _failed(self, error: EchoError) -> None:
        self._line(json.dumps({"seq": self.number, "ok": False, "error": str(error)}))

    def _show(self, data: bytes, seconds: float) -> None:
        objects = []
        for number, line in enumerate(data.split(b"\n")[:-1], self.number + 1):
            text = line.decode("utf-8", "backslashreplace")
            facts = {"seq": number, "bytes": len(line) + 1, "text": text, "seconds": round(seconds, 6), "ok": True}
            objects.append(json.dumps(facts))
        self._line("\n".join(objects))
