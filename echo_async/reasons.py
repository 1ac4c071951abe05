"""Why something failed, in the words of the system, the resolver or TLS: a few, in lower case, without numbers."""

from __future__ import annotations

import os
import socket
import ssl

__all__ = ["reason"]


def reason(error: Exception) -> str:
    """``connection refused``, ``name or service not known``, ``certificate verify failed: ...``"""
    if isinstance(error, ssl.SSLError):
        words = (error.reason or str(error)).lower().replace("_", " ")
        detail = getattr(error, "verify_message", "")
        return f"{words}: {detail}" if detail else words
    if isinstance(error, UnicodeError):
        return "not a host name"
    if isinstance(error, socket.gaierror):  # its numbers are not those of the system
        return str(error.strerror or error).lower()
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error).lower() or type(error).__name__
