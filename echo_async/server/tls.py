"""The server's TLS: TLS 1.2 and up, certificates that are proved at start and can be replaced while it runs."""

from __future__ import annotations

import ssl

from ..config import ServerConfig
from ..errors import StartError
from ..reasons import reason

__all__ = ["Certificates"]


class Certificates:
    """What the certificate files of ``config`` hold. :exc:`~echo_async.StartError` names the file that is wrong.

    ``context`` is for the handshakes that begin now. It is never changed: loading takes several steps, and another
    thread can be in the middle of a handshake. :meth:`reload` puts another in its place, once it is proved.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.reload()

    def reload(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _load(context, self._config)
        _prove(context, self._config)
        _trust(context, self._config)
        self.context = context


def _load(context: ssl.SSLContext, config: ServerConfig) -> None:
    certfile, keyfile = config.ssl_certfile, config.ssl_keyfile
    assert certfile is not None
    _read("ssl_certfile", certfile)
    _read("ssl_keyfile", keyfile)
    try:
        # A function, and not None, so that OpenSSL never asks for the password on the terminal.
        context.load_cert_chain(certfile, keyfile, lambda: config.ssl_keyfile_password or "")
    except (OSError, ValueError) as error:
        raise StartError(
            f"cannot use the certificate {certfile} with the key {keyfile or certfile}: {reason(error)}; "
            "give a certificate and its key in PEM, and ssl_keyfile_password if the key has one"
        ) from error


def _trust(context: ssl.SSLContext, config: ServerConfig) -> None:
    """Let in only who shows a certificate of the CAs that are named, if any are."""
    if config.ssl_ca_certs is not None:
        _read("ssl_ca_certs", config.ssl_ca_certs)
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except (OSError, ValueError) as error:
            raise StartError(
                f"cannot use the CA certificates {config.ssl_ca_certs}: {reason(error)}; give them in PEM"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED


def _read(option: str, path: str | None) -> None:
    """Whether the file can be read at all; OpenSSL's error does not say which one cannot."""
    if path is not None:
        try:
            with open(path, "rb"):
                pass
        except (OSError, ValueError) as error:
            raise StartError(f"cannot read {option} {path}: {reason(error)}") from error


def _prove(server: ssl.SSLContext, config: ServerConfig) -> None:
    """A handshake in memory, with a client that trusts just this certificate: it is valid today, and for a server."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    assert config.ssl_certfile is not None
    client.load_verify_locations(config.ssl_certfile)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    try:
        for side in (*sides, *sides):  # two rounds are what a handshake takes
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLError as error:
        raise StartError(
            f"cannot use the certificate {config.ssl_certfile}: {reason(error)}; give one that is valid"
        ) from error
