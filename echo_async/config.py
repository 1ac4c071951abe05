"""The options of servers and clients: one definition of every default, range and help text.

The library validates with these definitions. The commands and the option tables in the documentation
are made from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from os import PathLike, fsdecode
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, get_args

from .compat import DESCRIPTORS, UNIX_SOCKETS, require_feature
from .errors import ConfigError

if TYPE_CHECKING:
    from ssl import SSLContext

HOST = "127.0.0.1"
PORT = 5500
CONNECT_TIMEOUT = 10.0  # seconds
REPLY_TIMEOUT = 10.0  # seconds

StrPath = str | PathLike[str]
Mode = Literal["message", "stream", "raw", "identify"]
EngineName = Literal["streams", "protocol", "threads"]
ProxyProtocol = Literal["off", "v1", "v2", "auto"]
SentProxyVersion = Literal["v1", "v2"]

ADDRESS_OPTIONS = ("host", "port", "uds", "fd")
"""The fields of :class:`ServerConfig` that tell where to listen."""

INFO_LABELS = ("engine", "mode", "workers", "version")  # of the info metric itself
LABEL_PATTERN = r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*"  # Prometheus reserves __
MAX_LABELS_SIZE = 1024  # bytes of all labels, which each reply of identify mode contains
LOOPBACK = "127.0.0.1,::1"
LOOPBACK_NETWORKS = "127.0.0.0/8,::1"
MAX_INT = 2**31 - 1

_HOST_HELP = "Host name or address to listen on; :: for all, 0.0.0.0 for all of IPv4. Can be given several times."
_MODE_HELP = (
    "message: one message, then close. stream: many messages. raw: every byte as it arrives (RFC 862). "
    "identify: each message is answered with a line of JSON about the server and the connection."
)
_ENGINE_HELP = "streams: one coroutine per client. protocol: callbacks. threads: one thread per client."
_LABEL_HELP = "KEY=VALUE to report in identify mode, the info metric and JSON logs. Can be given several times."
_FAULT_HELP = "Fault of every connection, such as delay=0.05..0.2,slice=1..3; p=0.1 for a share of them."
_SEQUENCE_HELP = "Faults of the first connections, one each, separated by semicolons; none for a healthy one."
_SEED_HELP = "Seed of all random choices of faults; the same seed repeats them."
_UDP_HELP = "Answer datagrams as well, on the same addresses and port (RFC 862)."
_UDP_ALLOW_HELP = "Sources whose datagrams are answered: addresses and networks, or * for all."
_PROXY_HELP = "PROXY header with which every connection must begin; auto accepts v1 and v2."


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of option: which values are allowed, and how texts become a value.

    ``check`` returns False, or raises, if a value violates the ``requirement``; if ``is_explained``, the text of a
    :exc:`ValueError` is the requirement. ``convert`` makes a value of a text; ``combine`` does so of one or several, if
    several are allowed. ``split`` divides a variable into the texts of an option that can be given several times.
    ``choices``, ``limits`` and ``is_path`` are for the help text and for completion.
    """

    metavar: str
    requirement: str = ""
    check: Callable[[Any], object] = lambda value: True
    convert: Callable[[str], Any] = str
    combine: Callable[[list[str]], Any] | None = None
    split: Callable[[str], list[str]] | None = None
    choices: tuple[str, ...] = ()
    limits: tuple[int, int | None] | None = None
    is_path: bool = False
    is_explained: bool = False

    def violation(self, value: Any) -> str:
        """Return the requirement that ``value`` violates, such as ``must be an integer from 1 to 10``; else ``""``."""
        try:
            return self.requirement if self.check(value) is False else ""
        except (TypeError, ValueError, AttributeError) as error:
            return str(error) if self.is_explained and isinstance(error, ValueError) else self.requirement

    def parse(self, texts: list[str]) -> Any:
        """Convert one text, or several, to a value. If that is not possible, the result violates the requirement."""
        try:
            return self.convert(texts[0]) if self.combine is None else self.combine(texts)
        except ValueError:
            return texts


def integer(low: int = 0, high: int = MAX_INT) -> Kind:
    return Kind(
        "INTEGER",
        f"must be an integer from {low} to {high}",
        lambda value: isinstance(value, int) and low <= value <= high,
        convert=int,
        limits=(low, None if high == MAX_INT else high),
    )


def choice(choices: tuple[str, ...], pattern: str = "") -> Kind:
    """Return the kind of one of ``choices``, or of a text that matches ``pattern``."""

    def check(value: Any) -> bool:
        return value in choices or (pattern != "" and re.fullmatch(pattern, value) is not None)

    return Kind("|".join(choices), f"choose from {', '.join(choices)}", check, choices=choices)


def _seconds(requirement: str, is_allowed: Callable[[float], bool]) -> Kind:
    def check(value: Any) -> bool:
        return isinstance(value, int | float) and value < math.inf and is_allowed(value)

    return Kind("SECONDS", f"must be a number of seconds{requirement}", check, convert=float)


def _check_host(value: Any) -> bool:
    if isinstance(value, tuple):
        raise ValueError("must be a host name or an address; pass a pair of host and port as two arguments: *address")
    if isinstance(value, str) and (found := re.fullmatch(r"[^:]+:(\d+)", value)):
        raise ValueError(f"must be a host name or an address; give {found[1]} as the port")
    return isinstance(value, str) and value != "" and "\0" not in value


def _check_hosts(value: Any) -> bool:
    return all(map(_check_host, value)) if isinstance(value, list | tuple) and value else _check_host(value)


def _check_path(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value[1:]  # an abstract name begins with it


def _parsable(module: str, parser: str) -> Callable[[Any], object]:
    """Return a check that parses a value, and imports the parser only where the default is changed."""
    return lambda value: getattr(import_module(f".wire.{module}", __package__), parser)(value)


def _check_protocols(value: Any) -> bool:
    return all(0 < len(each.strip().encode()) < 256 for each in value.split(","))


def _check_labels(labels: Any) -> bool:
    are_valid = all(re.fullmatch(LABEL_PATTERN, key) and key not in INFO_LABELS for key in labels)
    return are_valid and sum(len(key) + len(value.encode()) for key, value in labels.items()) <= MAX_LABELS_SIZE


def _parse_labels(texts: list[str]) -> dict[str, str]:
    labels = dict(each.split("=", 1) for each in texts)
    if len(labels) < len(texts):
        raise ValueError("duplicate key")
    return labels


def _split_list(text: str) -> list[str]:
    return text.replace(",", " ").split()


_FLAG_TEXTS = dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True)
_FLAG_TEXTS |= dict.fromkeys(("0", "false", "f", "no", "n", "off"), False)

TEXT = Kind("TEXT")
FLAG = Kind(
    "",
    "must be a boolean",
    lambda value: not isinstance(value, str),
    convert=lambda text: _FLAG_TEXTS.get(text.strip().lower(), text),
)
SECONDS = _seconds(" greater than 0", lambda value: value > 0)
SECONDS_OR_ZERO = _seconds(", 0 or greater", lambda value: value >= 0)
HOST_NAME = Kind("HOST", "must be a host name or an address", _check_host, is_explained=True)
HOST_NAMES = replace(
    HOST_NAME, check=_check_hosts, combine=lambda texts: texts if len(texts) > 1 else texts[0], split=_split_list
)
SOCKET_PATH = Kind("PATH", "must be the path of a Unix socket", _check_path, is_path=True)
FILE = Kind("FILE", is_path=True)
NETWORKS = Kind(
    "NETWORKS",
    "must be addresses and networks separated by commas, or *",
    _parsable("networks", "Networks"),
    combine=",".join,
)
SOCKET_ADDRESS = Kind(
    "ADDRESS",
    "must be an IP address and a port, such as 192.0.2.1:40000 or [2001:db8::1]:40000",
    _parsable("proxy", "parse_address"),
)
PROTOCOLS = Kind("PROTOCOLS", "must be names of 1 to 255 bytes, separated by commas", _check_protocols)
LABELS = Kind(
    "LABELS",
    f"must be KEY=VALUE in UTF-8, at most {MAX_LABELS_SIZE} bytes in all, with letters, digits and _ in the key, "
    f"which is given once, does not begin with __ and is not {', '.join(INFO_LABELS[:-1])} or {INFO_LABELS[-1]}",
    _check_labels,
    combine=_parse_labels,
    split=_split_list,
)
FAULT = Kind(
    "FAULT", "must be a text such as reset=5", _parsable("faults", "parse_fault"), combine=",".join, is_explained=True
)
FAULTS = Kind(
    "FAULTS", "must be a sequence of faults", _parsable("faults", "parse_sequence"), combine=",".join, is_explained=True
)


@dataclass(frozen=True, slots=True)
class Option:
    """The default, the help text and the kind of one option. The default is allowed, whatever the kind.

    ``requires`` is the name of an option that must be set as well, or several names, joined by ``or``. ``default_text``
    describes a default that depends on the machine or on another option. ``flag`` is the name on the command line, if
    it is not that of the field.
    """

    default: Any
    help: str
    kind: Kind = TEXT
    requires: str = ""
    default_text: str = ""
    flag: str = ""

    def is_set(self, value: Any) -> bool:
        return value is not False and value != self.default

    def violation(self, value: Any) -> str:
        """Return the requirement that ``value`` violates; else ``""``."""
        return "" if value is self.default else self.kind.violation(value)

    def validate(self, name: str, value: Any) -> None:
        """Raise :exc:`~echo_async.ConfigError` unless ``value`` is allowed."""
        if requirement := self.violation(value):
            raise ConfigError(f"invalid {name}: {value!r} ({requirement})")


def _option(default: Any, help: str, *details: Any, repr: bool = True, **more: Any) -> Any:
    return field(default=default, repr=repr, metadata={"option": Option(default, help, *details, **more)})


def options_of(config: type[_Config]) -> dict[str, Option]:
    """Return the options of a configuration class, by field name."""
    return {each.name: each.metadata["option"] for each in fields(config)}


def lacks_required(option: Option, options: Mapping[str, Option], values: Mapping[str, Any]) -> bool:
    """Return whether ``option`` requires another one, which is not set in ``values``."""
    names = option.requires.split(" or ") if option.requires else ()
    return bool(names) and not any(options[name].is_set(values[name]) for name in names)


def _validate(config: ServerConfig | ClientConfig) -> None:
    """Validate every option. A path can be any :class:`os.PathLike`; the field then has the text."""
    options = options_of(type(config))
    values = {name: getattr(config, name) for name in options}
    for name, option in options.items():
        if option.kind.is_path and isinstance(values[name], PathLike):
            values[name] = fsdecode(values[name])
            object.__setattr__(config, name, values[name])  # as a frozen dataclass does it
        option.validate(name, values[name])
    for name, option in options.items():
        if option.is_set(values[name]) and lacks_required(option, options, values):
            raise ConfigError(f"{name} requires {option.requires}")
    if config.uds is not None:
        require_feature(UNIX_SOCKETS, "use uds")


@dataclass(frozen=True, slots=True)
class _Config:
    """Names an option that does not exist, and the one that was meant."""

    def __new__(cls, **options: Any) -> Self:
        names = list(options_of(cls))
        for name in options.keys() - set(names):
            raise TypeError(f"unknown option {name!r}; {suggest(name, names)}")
        return object.__new__(cls)


def suggest(name: str, names: Sequence[str]) -> str:
    """Return the question whether one of ``names`` was meant; the names themselves, if none is similar."""
    from difflib import get_close_matches

    similar = get_close_matches(name, names, 1)
    return f"did you mean {similar[0]!r}?" if similar else f"choose from {', '.join(names)}"


class ServerOptions(TypedDict, total=False):
    """The keyword arguments of ``serve``: the fields of :class:`ServerConfig`, each of them optional."""

    host: str | Sequence[str]
    port: int
    uds: StrPath | None
    fd: int | None
    mode: Mode
    chunk_size: int
    engine: EngineName
    backlog: int
    limit_connections: int | None
    limit_message_size: int
    timeout_idle: float
    timeout_message: float
    timeout_write: float
    timeout_graceful_shutdown: float
    ssl_certfile: StrPath | None
    ssl_keyfile: StrPath | None
    ssl_keyfile_password: str | None
    ssl_ca_certs: StrPath | None
    ssl_alpn: str | None
    proxy_protocol: ProxyProtocol
    proxy_allow_from: str
    udp: bool
    udp_allow_from: str
    labels: Mapping[str, str] | None
    fault: str | None
    fault_sequence: str | Sequence[str | None] | None
    fault_seed: int | None
    no_access_log: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig(_Config):
    """The configuration of a server. Sizes are in bytes, times in seconds.

    Each field is an option of the command, which describes it: ``echo-async server --help``.

    Raises:
        ConfigError: An option has an invalid value, or requires or excludes another option.
    """

    host: str | Sequence[str] = _option(HOST, _HOST_HELP, HOST_NAMES)
    port: int = _option(PORT, "Port to listen on; 0 selects a free port.", integer(0, 65535))
    uds: StrPath | None = _option(None, "Unix socket to listen on, instead of host and port.", SOCKET_PATH)
    fd: int | None = _option(None, "Descriptor of an inherited listening socket, instead of host and port.", integer())
    mode: Mode = _option("message", _MODE_HELP, choice(get_args(Mode)))
    chunk_size: int = _option(20, "Bytes requested per read.", integer(1, 2**30))
    engine: EngineName = _option("streams", _ENGINE_HELP, choice(get_args(EngineName)))
    backlog: int = _option(512, "Connections not yet accepted; at most net.core.somaxconn.", integer(1))
    limit_connections: int | None = _option(
        None,
        "Concurrent connections per listener and worker; more are refused.",
        integer(1),
        default_text="fits the descriptor limit",
    )
    limit_message_size: int = _option(1_048_576, "Bytes per message, newline included.", integer(1, 2**40))
    timeout_idle: float = _option(600.0, "Seconds until an idle connection is closed.", SECONDS)
    timeout_message: float = _option(60.0, "Seconds to complete a message.", SECONDS)
    timeout_write: float = _option(30.0, "Seconds until a connection whose peer does not read is closed.", SECONDS)
    timeout_graceful_shutdown: float = _option(10.0, "Seconds to drain connections at a graceful shutdown.", SECONDS)
    ssl_certfile: StrPath | None = _option(None, "Certificate chain (PEM); enables TLS. Reloaded on SIGHUP.", FILE)
    ssl_keyfile: StrPath | None = _option(
        None, "Private key (PEM), unless the certificate file contains it.", FILE, "ssl_certfile"
    )
    ssl_keyfile_password: str | None = _option(None, "Password of the private key.", TEXT, "ssl_certfile", repr=False)
    ssl_ca_certs: StrPath | None = _option(
        None, "CA certificates (PEM) that must have signed client certificates.", FILE, "ssl_certfile"
    )
    ssl_alpn: str | None = _option(
        None, "ALPN protocols to negotiate, preferred ones first: h2,echo.", PROTOCOLS, "ssl_certfile"
    )
    proxy_protocol: ProxyProtocol = _option("off", _PROXY_HELP, choice(get_args(ProxyProtocol)))
    proxy_allow_from: str = _option(
        LOOPBACK, "Trusted proxies: addresses and networks, or * for all.", NETWORKS, "proxy_protocol"
    )
    udp: bool = _option(False, _UDP_HELP, FLAG)
    udp_allow_from: str = _option(LOOPBACK_NETWORKS, _UDP_ALLOW_HELP, NETWORKS, "udp")
    labels: Mapping[str, str] | None = _option(None, _LABEL_HELP, LABELS, flag="label")
    fault: str | None = _option(None, _FAULT_HELP, FAULT)
    fault_sequence: str | Sequence[str | None] | None = _option(None, _SEQUENCE_HELP, FAULTS)
    fault_seed: int | None = _option(
        None, _SEED_HELP, integer(0, 2**63 - 1), "fault or fault_sequence", default_text="random, and logged"
    )
    no_access_log: bool = _option(False, "Disable the log line per message.", FLAG)

    def __post_init__(self) -> None:
        _validate(self)
        if self.udp and self.uds is not None:
            raise ConfigError("udp conflicts with uds; use host and port")
        if self.fd is not None:
            require_feature(DESCRIPTORS, "use fd")
        if self.fd is not None and self.uds is not None:
            raise ConfigError("fd and uds are mutually exclusive")
        if self.fault is not None and self.fault_sequence is not None:
            raise ConfigError("fault and fault_sequence are mutually exclusive")
        if self.fd is not None and self.has_faults:
            raise ConfigError("fault and fault_sequence conflict with fd; use host and port, or uds")

    @property
    def has_faults(self) -> bool:
        """Whether connections can have a fault."""
        return self.fault is not None or self.fault_sequence is not None

    @property
    def has_scripts(self) -> bool:
        """Whether replies are more than echoes: connections can have a fault, or are identified."""
        return self.has_faults or self.mode == "identify"

    @property
    def accepts(self) -> bool:
        """Whether connections are accepted. With the fault ``no-accept`` they are not."""
        return self.fault is None or self.fault.strip() != "no-accept"


class ClientOptions(TypedDict, total=False):
    """The keyword arguments of ``connect`` and ``echo``."""

    uds: StrPath | None
    timeout: float
    connect_timeout: float
    retry: float
    ssl: SSLContext | bool | None
    server_hostname: str | None
    send_proxy: SentProxyVersion | None
    proxy_source: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientConfig(_Config):
    """The configuration of a client. Times are in seconds.

    Raises:
        ConfigError: An option has an invalid value, or requires another option.
    """

    host: str = _option(HOST, "Host name or address of the server.", HOST_NAME)
    port: int = _option(PORT, "Port of the server.", integer(1, 65535))
    uds: StrPath | None = _option(None, "Unix socket of the server, instead of host and port.", SOCKET_PATH)
    timeout: float = _option(REPLY_TIMEOUT, "Seconds to wait for each reply.", SECONDS)
    connect_timeout: float = _option(CONNECT_TIMEOUT, "Seconds to wait for each connection.", SECONDS)
    retry: float = _option(0.0, "Seconds to keep retrying to connect.", SECONDS_OR_ZERO)
    ssl: SSLContext | bool | None = _option(None, "Use TLS; implied by every other TLS option.", FLAG)
    server_hostname: str | None = _option(
        None, "Name that the certificate must have.", HOST_NAME, "ssl", default_text="the host"
    )
    send_proxy: SentProxyVersion | None = _option(
        None, "Send a PROXY header of this version first, before TLS.", choice(get_args(SentProxyVersion))
    )
    proxy_source: str | None = _option(
        None,
        "Client address in the PROXY header, such as 192.0.2.1:40000.",
        SOCKET_ADDRESS,
        "send_proxy",
        default_text="the real one",
    )

    def __post_init__(self) -> None:
        _validate(self)
