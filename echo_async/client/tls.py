"""The client's TLS context: TLS 1.2 and up; the server's certificate is checked, unless that is given up by name."""

from __future__ import annotations

import ssl

from ..errors import ConfigError
from ..reasons import reason

__all__ = ["client_context"]


def client_context(
    *, ca_certs: str | None = None, certfile: str | None = None, keyfile: str | None = None, verify: bool = True
) -> ssl.SSLContext:
    """A context that trusts ``ca_certs`` (or the system's), and shows ``certfile`` if the server asks."""
    if keyfile and not certfile:
        raise ConfigError("ssl_keyfile is for a certificate: give ssl_certfile as well")
    try:
        context = ssl.create_default_context(cafile=ca_certs)
    except OSError as error:
        raise ConfigError(f"ssl_ca_certs {ca_certs}: {reason(error)}; give a file of certificates (PEM)") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certfile:
        try:
            context.load_cert_chain(certfile, keyfile, password="")  # never ask on the terminal
        except OSError as error:
            names = f"ssl_certfile {certfile}" + (f", ssl_keyfile {keyfile}" if keyfile else "")
            raise ConfigError(f"{names}: {reason(error)}; give a certificate and its key (PEM, no password)") from error
    return context
