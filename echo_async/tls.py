"""TLS contexts of the server and the client, TLS 1.2 or newer."""

import contextlib
import ssl
from collections.abc import Iterator

from .config import ServerConfig, StrPath
from .errors import ConfigError, EchoError, StartError, describe_error


class Certificates:
    """The server's certificate files as an SSL context, validated at startup and on :meth:`reload`.

    ``expires_at`` is the end of the server certificate's validity, in seconds since the epoch. ``reloads`` counts the
    calls of :meth:`reload` by their result. ``context`` is for new handshakes. A reload replaces the context instead of
    changing it, since another thread may use it in a handshake. :exc:`~echo_async.StartError` names the file that is
    invalid.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.reloads = {"success": 0, "failure": 0}
        self._load()

    def reload(self) -> None:
        """Load and validate the files; replace ``context`` only if they are valid."""
        try:
            self._load()
        except StartError:
            self.reloads["failure"] += 1
            raise
        self.reloads["success"] += 1

    def _load(self) -> None:
        config = self._config
        assert config.ssl_certfile is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        certfile, keyfile = config.ssl_certfile, config.ssl_keyfile or config.ssl_certfile
        _check_readable("ssl_certfile", certfile)
        _check_readable("ssl_keyfile", keyfile)
        files = f"the certificate {certfile} with the key {keyfile}"
        with _loading_errors(StartError, files, "both must be PEM; an encrypted key requires ssl_keyfile_password"):
            # A function, not None, so that OpenSSL never prompts for the password on the terminal.
            context.load_cert_chain(certfile, keyfile, lambda: config.ssl_keyfile_password or "")
        expires_at = _validate(context, certfile)
        if config.ssl_ca_certs is not None:
            _check_readable("ssl_ca_certs", config.ssl_ca_certs)
            with _loading_errors(StartError, f"the CA certificates {config.ssl_ca_certs}", "they must be PEM"):
                context.load_verify_locations(config.ssl_ca_certs)
            context.verify_mode = ssl.CERT_REQUIRED
        if config.ssl_alpn is not None:
            context.set_alpn_protocols([each.strip() for each in config.ssl_alpn.split(",")])
        self.context, self.expires_at = context, expires_at


@contextlib.contextmanager
def _loading_errors(error_type: type[EchoError], files: str, advice: str) -> Iterator[None]:
    """Raise ``error_type``, which names the files and what to do, if they cannot be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise error_type(f"cannot load {files}: {describe_error(error)}; {advice}") from error


def _check_readable(option: str, path: StrPath) -> None:
    """Open the file: the errors of OpenSSL do not tell which file is unreadable."""
    with _loading_errors(StartError, f"{option} {path}", "check the path and its permissions"), open(path, "rb"):
        pass


def _validate(server: ssl.SSLContext, certfile: StrPath) -> float:
    """Check that the certificate is valid today, and for a server, by a handshake in memory; return its end."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    with _loading_errors(StartError, f"the certificate {certfile}", "use a valid server certificate"):
        client.load_verify_locations(certfile)  # the file may have changed since it was loaded
        peers = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
        for peer in (*peers, *peers):  # a handshake takes two rounds
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.do_handshake()
        return ssl.cert_time_to_seconds(str((peers[0].getpeercert() or {})["notAfter"]))


def client_context(
    *, ca_certs: str | None = None, certfile: str | None = None, keyfile: str | None = None, verify: bool = True
) -> ssl.SSLContext:
    """Create a client's context, which trusts ``ca_certs`` (default: the system's) and sends ``certfile`` on request.

    :exc:`~echo_async.ConfigError` if a file is invalid.
    """
    if keyfile and not certfile:
        raise ConfigError("ssl_keyfile requires ssl_certfile")
    with _loading_errors(ConfigError, f"ssl_ca_certs {ca_certs}", "it must be a PEM file of certificates"):
        context = ssl.create_default_context(cafile=ca_certs)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certfile:
        files = f"ssl_certfile {certfile}" + (f" with ssl_keyfile {keyfile}" if keyfile else "")
        with _loading_errors(ConfigError, files, "both must be PEM, the key without a password"):
            context.load_cert_chain(certfile, keyfile, password="")  # never prompt on the terminal
    return context
