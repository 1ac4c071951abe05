"""Certificates of servers for tests: valid ones, and those that a client has to refuse. They require trustme."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

from ..errors import StartError

if TYPE_CHECKING:
    import trustme

TlsKind = Literal["expired", "wrong-host", "untrusted", "stalled", "plain"]

OTHER_HOST = "other.example"  # of a certificate for the wrong host


class Certificates:
    """A CA of its own, and a client context that trusts only that CA. Files are removed with ``files``."""

    def __init__(self, host: str | Sequence[str], files: ExitStack) -> None:
        self._hosts = {"localhost", "127.0.0.1", "::1", *([host] if isinstance(host, str) else host)}
        self._files = files
        self._authority = _make_authority()
        pem = self._authority.cert_pem.bytes().decode()
        self.client_context = ssl.create_default_context(cadata=pem)

    def issue(self, kind: TlsKind | bool) -> str:
        """Return the path of a file with a certificate, of a kind that a client has to refuse unless it is true."""
        authority = _make_authority() if kind == "untrusted" else self._authority
        hosts = [OTHER_HOST] if kind == "wrong-host" else self._hosts
        days = -1 if kind == "expired" else 1
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days)
        certificate = authority.issue_cert(*hosts, not_after=end)
        return str(self._files.enter_context(certificate.private_key_and_cert_chain_pem.tempfile()))


def _make_authority() -> trustme.CA:
    try:
        import trustme
    except ImportError as error:
        raise StartError(
            "cannot create a certificate: trustme is not installed; install it with 'pip install trustme'"
        ) from error
    return trustme.CA()
