"""TLS contexts, TLS 1.2 and newer: the server's, validated at startup and replaced on reload, and the client's."""

from __future__ import annotations

import ssl

from .config import ServerConfig
from .errors import ConfigError, StartError, describe_error

__all__ = ["Certificates", "client_context"]


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
        _validate(context, self._config)
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
            f"cannot use the certificate {certfile} with the key {keyfile or certfile}: {describe_error(error)}; "
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
                f"cannot use the CA certificates {config.ssl_ca_certs}: {describe_error(error)}; give them in PEM"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED


def _read(option: str, path: str | None) -> None:
    """Whether the file can be read at all; OpenSSL's error does not say which one cannot."""
    if path is not None:
        try:
            with open(path, "rb"):
                pass
        except (OSError, ValueError) as error:
            raise StartError(f"cannot read {option} {path}: {describe_error(error)}") from error


def _validate(server: ssl.SSLContext, config: ServerConfig) -> None:
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
            f"cannot use the certificate {config.ssl_certfile}: {describe_error(error)}; give one that is valid"
        ) from error


def client_context(
    *, ca_certs: str | None = None, certfile: str | None = None, keyfile: str | None = None, verify: bool = True
) -> ssl.SSLContext:
    """A context that trusts ``ca_certs`` (or the system's), and shows ``certfile`` if the server asks."""
    if keyfile and not certfile:
        raise ConfigError("ssl_keyfile is for a certificate: give ssl_certfile as well")
    try:
        context = ssl.create_default_context(cafile=ca_certs)
    except OSError as error:
        raise ConfigError(
            f"ssl_ca_certs {ca_certs}: {describe_error(error)}; give a file of certificates (PEM)"
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certfile:
        try:
            context.load_cert_chain(certfile, keyfile, password="")  # never ask on the terminal
        except OSError as error:
            names = f"ssl_certfile {certfile}" + (f", ssl_keyfile {keyfile}" if keyfile else "")
            raise ConfigError(
                f"{names}: {describe_error(error)}; give a certificate and its key (PEM, no password)"
            ) from error
    return context
