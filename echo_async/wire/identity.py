"""The replies in ``identify`` mode, without IO: what a server knows of itself, a connection and a message.

A reply is one line of JSON. Everything but the message is the same for all messages of a connection, so it is
serialized once. It has at most 16 KiB: TLVs and names in certificates that do not fit are left out.
"""

from __future__ import annotations

import builtins
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import ReplyDifferent
from .script import Action, Send, split_messages

__all__ = ["Address", "ClientCertificate", "Identity", "Kubernetes", "Proxy", "Responder", "Tls"]

MAX_DETAILS = 16 * 1024 - 128  # bytes of JSON for all but message, bytes and number; TLVs take what the others leave
MAX_TEXT = 320  # bytes of JSON for a value that a peer or the environment chooses
MAX_NAMES = 1024  # bytes of JSON for the subject of a certificate, and for its alternative names

SHORT_NAMES = {  # RFC 4514 section 3
    "commonName": "CN",
    "countryName": "C",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
}
JSON_TYPES: dict[Any, type] = {Mapping: dict, Sequence: list}


@dataclass(frozen=True, slots=True)
class Address:
    """An IP address and a port. Of a Unix socket the address is the path, and there is no port."""

    address: str | None = None
    port: int | None = None

    @classmethod
    def of(cls, name: object) -> Address:
        """Convert a socket address."""
        if isinstance(name, tuple):
            return cls(name[0].removeprefix("::ffff:") if "." in name[0] else name[0], name[1])
        if isinstance(name, bytes):
            name = name.decode("utf-8", "replace")
        return cls(_shorten(str(name))) if name else cls()


@dataclass(frozen=True, slots=True)
class Responder:
    """The server that answers."""

    hostname: str | None = None
    pid: int | None = None
    address: str | None = None
    version: str | None = None
    engine: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """Where it runs, from environment variables that a manifest sets from the downward API."""

    pod: str | None = None
    namespace: str | None = None
    node: str | None = None
    ip: str | None = None
    service: str | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Kubernetes:
        namespace = "POD_NAMESPACE" if environment.get("POD_NAMESPACE") else "NAMESPACE"
        names = ("POD_NAME", namespace, "NODE_NAME", "POD_IP", "SERVICE_NAME")
        return cls(*(_shorten(environment[name]) if environment.get(name) else None for name in names))


@dataclass(frozen=True, slots=True)
class Proxy:
    """The PROXY header of the connection. ``peer`` is the address of the proxy itself."""

    version: int
    peer: Address
    source: Address
    destination: Address
    tlvs: Mapping[str, Any]

    @classmethod
    def of(cls, peer: object, header: Any) -> Proxy:
        """Describe a :class:`~echo_async.wire.proxy.ProxyHeader`."""
        source, destination = Address.of(header.source), Address.of(header.destination)
        return cls(header.version, Address.of(peer), source, destination, header.tlvs)


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """The certificate that the client has shown."""

    subject: str | None
    sans: Sequence[str]
    serial: str | None

    @classmethod
    def of(cls, certificate: Mapping[str, Any]) -> ClientCertificate:
        """Describe the result of :meth:`ssl.SSLSocket.getpeercert`."""
        parts = [part for parts in certificate.get("subject", ()) for part in parts]
        names = [f"{SHORT_NAMES.get(kind, kind)}={_shorten(_escape_attribute(value))}" for kind, value in parts]
        alternatives = [f"{kind}:{_shorten(value)}" for kind, value in certificate.get("subjectAltName", ())]
        subject = ",".join(_limit_size(names, MAX_NAMES)) or None
        return cls(subject, _limit_size(alternatives, MAX_NAMES), certificate.get("serialNumber"))


@dataclass(frozen=True, slots=True)
class Tls:
    """The TLS session. ``sni`` is the server name that the client asked for."""

    version: str | None = None
    cipher: str | None = None
    sni: str | None = None
    alpn: str | None = None
    client_certificate: ClientCertificate | None = None

    @classmethod
    def of(cls, session: Any, server_name: str | None) -> Tls:
        """Describe an :class:`ssl.SSLObject`."""
        certificate, alpn = session.getpeercert(), session.selected_alpn_protocol()
        return cls(
            session.version(),
            (session.cipher() or [None])[0],
            server_name and _shorten(server_name),
            alpn and _shorten(alpn),
            ClientCertificate.of(certificate) if certificate else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The reply to one message in ``identify`` mode.

    Attributes:
        message: The message without its newline, None if it is not UTF-8.
        message_base64: The same in base64, if it is not UTF-8.
        bytes: Its size in bytes, including the newline.
        number: Its number on the connection, from 1.
        server: The server that answered.
        kubernetes: Its pod, as far as the environment names it.
        client: The client's address: of the peer, or what the PROXY header says.
        proxy: The PROXY header, if there was one.
        tls: The TLS session, if there is one.
    """

    message: str | None = None
    message_base64: str | None = None
    bytes: int
    number: int
    server: Responder
    kubernetes: Kubernetes
    client: Address
    proxy: Proxy | None
    tls: Tls | None

    @classmethod
    def parse(cls, line: builtins.bytes) -> Identity:
        """Parse a reply. A value that is missing is None; unknown keys are ignored.

        Raises:
            ValueError: It is not a reply of a server in ``identify`` mode.
        """
        import json

        try:
            identity: Identity = _from_json(cls, "reply", json.loads(line.decode("utf-8", "surrogatepass")))
            _content_of(identity)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not an identify reply: {error}") from error
        return identity


def max_reply_size(message: bytes) -> int:
    """Return the most bytes of a reply to ``message``: in JSON, a control character takes six."""
    return 6 * len(message) + 16 * 1024


def check_reply(line: bytes, message: bytes, name: str) -> Identity:
    """Parse the reply of the server ``name`` to ``message``. :exc:`ReplyDifferent` if it is none, or of another."""
    try:
        identity = Identity.parse(line)
    except ValueError as error:
        raise ReplyDifferent(f"invalid reply: {error}; is {name} in identify mode?", 0) from error
    content = _content_of(identity)
    if (content + b"\n", identity.bytes) != (message, len(message)):
        raise ReplyDifferent(f"reply of {name} reports another message: {content[:40]!r}", 0)
    return identity


def _content_of(identity: Identity) -> bytes:
    """Return the message without its newline. :exc:`ValueError` if it is neither text nor base64."""
    if identity.message is not None:
        return identity.message.encode()
    if identity.message_base64 is None:
        raise ValueError("neither message nor message_base64")
    return b64decode(identity.message_base64, validate=True)


def _from_json(kind: Any, name: str, value: Any) -> Any:
    """Convert a JSON value to the type ``kind`` of the field ``name``. :exc:`ValueError` if it is of another type."""
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"invalid {name}: expected a JSON object, received {value!r:.40}")
        return kind(**{each: _from_json(type, each, value.get(each)) for each, type in _field_types(kind).items()})
    if isinstance(kind, UnionType):  # with None
        return None if value is None else _from_json(get_args(kind)[0], name, value)
    if isinstance(value, bool) or not isinstance(value, JSON_TYPES.get(get_origin(kind), kind)):
        raise ValueError(f"invalid {name}: {value!r:.40}")
    if get_args(kind)[1:] == (str,):
        for text in value.values():
            _from_json(str, name, text)
    return value


@cache
def _field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


class Describer:
    """Makes the replies of one connection."""

    def __init__(
        self, server: Responder, kubernetes: Kubernetes, client: Address, proxy: Proxy | None, tls: Tls | None
    ) -> None:
        details: dict[str, Any] = {
            "server": asdict(server),
            "kubernetes": asdict(kubernetes),
            "client": asdict(client),
            "proxy": None if proxy is None else asdict(replace(proxy, tlvs={})),
            "tls": None if tls is None else asdict(tls),
        }
        if proxy is not None and proxy.tlvs:
            details["proxy"]["tlvs"] = _limit_tlvs(proxy.tlvs, MAX_DETAILS - len(_to_json(details)))
        self._details = _to_json(details)[1:] + b"\n"

    def describe(self, message: bytes, number: int) -> bytes:
        """Return the reply to ``message``, which ends with a newline."""
        content = message[:-1]
        try:
            text = b'"message": ' + _to_json(content.decode())
        except UnicodeDecodeError:
            text = b'"message_base64": "%s"' % b64encode(content)
        return b'{%s, "bytes": %d, "number": %d, %s' % (text, len(message), number, self._details)


class IdentifyScript:
    """Replies to each message with a line that describes the connection and the message.

    A message of one byte has a reply of up to 16 KiB. That is why it is a script: replies are made one at a time,
    as fast as the client reads them.
    """

    is_silent = False

    def __init__(self, make_describer: Callable[[], Describer]) -> None:
        self._make_describer = make_describer
        self._describer: Describer | None = None  # made for the first reply
        self._number = 0  # of the last message

    def start(self) -> Iterator[Action]:
        return iter(())

    def reply(self, data: bytes) -> Iterator[Action]:
        if self._describer is None:
            self._describer = self._make_describer()
        for message in split_messages(data):
            self._number += 1
            yield Send(self._describer.describe(message, self._number))


def _to_json(value: object) -> bytes:
    import json  # where it is used: the package exports Identity

    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _shorten(text: str) -> str:
    if len(_to_json(text)) <= MAX_TEXT:
        return text
    text = text[:MAX_TEXT]
    while len(_to_json(text)) > MAX_TEXT - len("..."):
        text = text[: len(text) * 7 // 8]
    return text + "..."


def _escape_attribute(value: str) -> str:
    """Escape what would separate attributes in the text of a subject (RFC 4514 section 2.4)."""
    return "".join(f"\\{each}" if each in '"+,;<>\\' else each for each in value)


def _limit_size(texts: list[str], size: int) -> list[str]:
    """Return the first of ``texts`` that fit into ``size`` bytes of JSON, and ``...`` if there are more."""
    total = 0
    for number, text in enumerate(texts):
        total += len(_to_json(text)) + 2
        if total > size:
            return [*texts[:number], "..."]
    return texts


def _limit_tlvs(tlvs: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return the fields that fit into ``size`` bytes of JSON; the names of the others are in ``omitted``."""
    if len(_to_json(tlvs)) <= size:
        return dict(tlvs)
    kept: dict[str, Any] = {}
    omitted: list[str] = []
    left = size - MAX_NAMES - len('"omitted": ["..."]')
    for name, value in tlvs.items():
        needed = len(_to_json({name: value}))
        if needed <= left:
            left -= needed
            kept[name] = value
        else:
            omitted.append(name)
    return {**kept, "omitted": _limit_size(omitted, MAX_NAMES)}
