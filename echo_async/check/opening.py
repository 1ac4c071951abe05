"""The checks that all others require: the connection, TLS, and what the server does with messages."""

import ssl
from time import monotonic, perf_counter, time

from ..client.connector import connect_first, find_addresses, start_tls
from ..net import format_address
from .connection import Connection
from .context import IDENTIFY, MESSAGE, RAW, STREAM, Context, Mode
from .explanation import quote
from .result import Failure

SECONDS_PER_DAY = 86_400
RAW_WAIT, RAW_ROUND_TRIPS = 0.2, 4  # seconds, and more of them, in which mode raw returns the beginning of a message
INVALID_CERTIFICATE = "it has expired, is for another name, or --ssl-ca-certs lacks its CA"
NO_TLS = "the server does not use TLS, refuses this client, or does not answer the handshake"
NO_NEWLINE = "the newline is removed: it is a part of the message, and of the reply"
PER_READ = "each read is answered as if it were a whole message, which ends with a newline"
ECHO_PER_READ = "the server returns what each recv gives it, instead of whole messages"
SILENCE_HINT = (
    "the server expects something else (TLS, a PROXY header, another protocol), or a proxy has no server behind it"
)


def check_connect(context: Context) -> str:
    endpoint, started = context.endpoint, perf_counter()
    deadline = monotonic() + endpoint.config.connect_timeout
    try:
        addresses = find_addresses(endpoint, deadline)
        resolved = perf_counter()
        context.address, context.first = connect_first(endpoint, addresses, deadline)
    except (OSError, UnicodeError) as error:
        raise context.connect_failure(error, "") from error
    name = format_address(context.address[4])
    details = "" if name == endpoint.name else f"{name}, name resolved in {_milliseconds(resolved - started)}, "
    return f"{details}connected in {_milliseconds(perf_counter() - resolved)}"


def check_tls(context: Context) -> str:
    started = perf_counter()
    deadline = monotonic() + context.endpoint.config.connect_timeout
    assert context.first is not None
    try:
        context.first = secured = start_tls(context.endpoint, context.first, deadline)
    except OSError as error:
        is_invalid = isinstance(error, ssl.SSLCertVerificationError)
        raise context.connect_failure(error, INVALID_CERTIFICATE if is_invalid else NO_TLS) from error
    cipher, certificate = secured.cipher(), secured.getpeercert()
    if certificate:
        left = ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time()
        expiry = f"certificate expires in {left / SECONDS_PER_DAY:.0f} days"
    else:
        expiry = "certificate not verified"
    duration = _milliseconds(perf_counter() - started)
    return f"{secured.version()}, {cipher[0] if cipher else 'no cipher'}, {expiry}, handshake in {duration}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def check_mode(context: Context) -> str:
    expected = context.settings.mode
    context.mode = _find_mode(context)
    found = context.mode.name
    if expected not in ("auto", found):
        mismatch = f"the server is not in mode {expected}, or the path changes what it does"
        raise Failure(f"mode {found}", ECHO_PER_READ if context.mode is RAW else mismatch)
    return found


def _find_mode(context: Context) -> Mode:
    """Find the mode by two messages and the beginning of a third one, on the first connection."""
    assert context.first is not None
    connection = context.adopt(Connection(context.first))
    connection.send(b"one\n")
    context.wait(lambda: connection.ending or connection.lines)
    if IDENTIFY.decode(bytes(connection.received)) == b"one\n" != connection.received:
        return IDENTIFY
    context.compare(connection, b"one\n", SILENCE_HINT if not connection.received else NO_NEWLINE)
    started = perf_counter()
    connection.send(b"two\n")
    context.wait(lambda: connection.ending or connection.lines)
    if not connection.received:
        return MESSAGE
    context.compare(connection, b"two\n", "the second message of a connection is not answered correctly")
    seconds = RAW_WAIT + RAW_ROUND_TRIPS * (perf_counter() - started)
    connection.send(b"three")
    is_given = context.settings.mode == RAW.name
    context.wait(lambda: connection.ending or connection.received, None if is_given else seconds)
    received = bytes(connection.received)
    if not b"three".startswith(received):
        raise Failure(f"{quote(received)} for {quote(b'three')}, before its newline is sent", PER_READ)
    return RAW if received else STREAM
