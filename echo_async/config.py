"""The options of servers and clients: one definition of every default, range and help text.

The library validates with these definitions. The commands and the option tables in the documentation
are made from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike, fsdecode
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from .compat import DESCRIPTORS, UNIX_SOCKETS, require_feature
from .errors import ConfigError

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = [
    "CONNECT_TIMEOUT",
    "HOST",
    "PORT",
    "REPLY_TIMEOUT",
    "ClientConfig",
    "ClientOptions",
    "EngineName",
    "Mode",
    "ProxyProtocol",
    "ServerConfig",
    "ServerOptions",
]

HOST = "127.0.0.1"
PORT = 5500
CONNECT_TIMEOUT = 10.0  # seconds
REPLY_TIMEOUT = 10.0  # seconds

StrPath = str | PathLike[str]
Mode = Literal["message", "stream", "raw", "identify"]
EngineName = Literal["streams", "protocol", "threads"]
ProxyProtocol = Literal["off", "v1", "v2", "auto"]
SentProxyVersion = Literal["v1", "v2"]

OptionType = Literal[
    "text",
    "host",
    "path",
    "file",
    "networks",
    "address",
    "integer",
    "seconds",
    "choice",
    "flag",
    "fault",
    "faults",
    "protocols",
    "labels",
    "spec",
]

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
_LABELS_REQUIREMENT = (
    f"must be KEY=VALUE in UTF-8, at most {MAX_LABELS_SIZE} bytes in all, with letters, digits and _ in the key, "
    f"which is given once, does not begin with __ and is not {', '.join(INFO_LABELS[:-1])} or {INFO_LABELS[-1]}"
)
_FAULT_HELP = "Fault of every connection, such as delay=0.05..0.2,slice=1..3; p=0.1 for a share of them."
_SEQUENCE_HELP = "Faults of the first connections, one each, separated by semicolons; none for a healthy one."
_SEED_HELP = "Seed of all random choices of faults; the same seed repeats them."
_UDP_HELP = "Answer datagrams as well, on the same addresses and port (RFC 862)."
_UDP_ALLOW_HELP = "Sources whose datagrams are answered: addresses and networks, or * for all."
_PROXY_HELP = "PROXY header with which every connection must begin; auto accepts v1 and v2."


@dataclass(frozen=True, slots=True)
class Option:
    """The default, the help text and the allowed values of one option. None is allowed if it is the default.

    ``default_text`` describes a default that depends on the machine or on another option. A text that matches
    ``pattern`` is allowed besides ``choices``; a sequence of values is allowed besides one if ``is_repeatable``.
    ``flag`` is the name on the command line, if it is not that of the field.
    """

    default: Any
    help: str
    type: OptionType = "text"
    low: int = 0
    high: int = MAX_INT
    choices: tuple[str, ...] = ()
    pattern: str = ""
    is_repeatable: bool = False
    is_zero_allowed: bool = False
    default_text: str = ""
    flag: str = ""

    def validate(self, name: str, value: Any) -> None:
        """Raise :exc:`~echo_async.ConfigError` unless ``value`` is allowed."""
        if requirement := self.violation(value):
            raise ConfigError(f"invalid {name}: {value!r} ({requirement})")

    def violation(self, value: Any) -> str:
        """Return the requirement that ``value`` violates, such as ``must be an integer from 1 to 10``; else ``""``."""
        match self.type:
            case "choice":
                is_valid = value in self.choices or _matches_pattern(self.pattern, value)
                requirement = f"choose from {', '.join(self.choices)}"
            case "integer":
                is_valid = isinstance(value, int) and self.low <= value <= self.high
                requirement = f"must be an integer from {self.low} to {self.high}"
            case "seconds":
                is_number = isinstance(value, int | float) and 0 <= value < math.inf
                is_valid = is_number and (value > 0 or self.is_zero_allowed)
                requirement = "must be a number of seconds"
                requirement += ", 0 or greater" if self.is_zero_allowed else " greater than 0"
            case "host":
                hosts = value if self.is_repeatable and isinstance(value, list | tuple) else [value]
                is_valid = bool(hosts) and all(isinstance(each, str) and each and "\0" not in each for each in hosts)
                requirement = "must be a host name or an address"
            case "path":
                is_valid = isinstance(value, str) and value != "" and "\0" not in value[1:]
                requirement = "must be the path of a Unix socket"
            case "networks":
                is_valid = value == self.default or _are_networks(value)
                requirement = "must be addresses and networks separated by commas, or *"
            case "address":
                is_valid = _is_address(value)
                requirement = "must be an IP address and a port, such as 192.0.2.1:40000 or [2001:db8::1]:40000"
            case "protocols":
                is_valid, requirement = _are_protocols(value), "must be names of 1 to 255 bytes, separated by commas"
            case "labels":
                is_valid, requirement = _are_labels(value), _LABELS_REQUIREMENT
            case "fault" | "faults":
                requirement = _fault_violation(value, self.type)
                is_valid = requirement == ""
            case "flag":
                is_valid, requirement = not isinstance(value, str), "must be a boolean"
            case _:
                is_valid, requirement = True, ""
        return "" if is_valid or (value is None and self.default is None) else requirement


def _matches_pattern(pattern: str, value: Any) -> bool:
    import re

    return pattern != "" and isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _are_networks(value: Any) -> bool:
    from .wire.networks import Networks  # only where the default is changed

    try:
        Networks(value)
    except (ValueError, AttributeError):
        return False
    return True


def _is_address(value: Any) -> bool:
    from .wire.proxy import parse_address

    try:
        parse_address(value)
    except (ValueError, AttributeError):
        return False
    return True


def parse_labels(texts: str | Sequence[str]) -> dict[str, str]:
    """Parse one or more ``KEY=VALUE``. :exc:`ValueError` if there is no ``=``, or two have the same key."""
    pairs = [each.split("=", 1) for each in ([texts] if isinstance(texts, str) else texts)]
    labels = dict(pairs)
    if len(labels) < len(pairs):
        raise ValueError("duplicate key")
    return labels


def _are_protocols(value: Any) -> bool:
    return isinstance(value, str) and all(0 < len(each.strip().encode()) < 256 for each in value.split(","))


def _are_labels(labels: Any) -> bool:
    """Return whether ``labels`` are a mapping, or texts of the form ``KEY=VALUE``."""
    try:
        pairs = (labels if isinstance(labels, Mapping) else parse_labels(labels)).items()
        are_valid = all(_matches_pattern(LABEL_PATTERN, key) and key not in INFO_LABELS for key, _ in pairs)
        return are_valid and sum(len(key) + len(value.encode()) for key, value in pairs) <= MAX_LABELS_SIZE
    except (TypeError, ValueError, AttributeError):
        return False


def _fault_violation(value: Any, type: OptionType) -> str:
    if value is None:
        return ""
    from .wire.faults import parse_fault, parse_sequence

    try:
        parse_fault(value) if type == "fault" else parse_sequence(value)
    except (TypeError, AttributeError):
        return "must be a text such as reset=5" if type == "fault" else "must be a sequence of faults"
    except ValueError as error:
        return str(error)
    return ""


def _option(default: Any, help: str, *details: Any, repr: bool = True, **more: Any) -> Any:
    return field(default=default, repr=repr, metadata={"option": Option(default, help, *details, **more)})


def options_of(config: type[ServerConfig] | type[ClientConfig]) -> dict[str, Option]:
    """Return the options of a configuration class, by field name."""
    return {each.name: each.metadata["option"] for each in fields(config)}


def listener_options() -> dict[str, Option]:
    """Return the options in which the listeners of one process can differ, by field name, besides address and TLS."""
    shared = {*ADDRESS_OPTIONS, "engine", "backlog"}
    return {
        name: option
        for name, option in options_of(ServerConfig).items()
        if name not in shared and not name.startswith("ssl_")
    }


def _validate(config: ServerConfig | ClientConfig) -> None:
    """Validate every option. A path can be any :class:`os.PathLike`; the field then has the text."""
    for name, option in options_of(type(config)).items():
        value = getattr(config, name)
        if option.type in ("path", "file") and isinstance(value, PathLike):
            value = fsdecode(value)
            object.__setattr__(config, name, value)  # as a frozen dataclass does it
        option.validate(name, value)


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
class ServerConfig:
    """The configuration of a server. Sizes are in bytes, times in seconds.

    Each field is an option of the command, which describes it: ``echo-async server --help``.

    Raises:
        ConfigError: An option has an invalid value, or requires or excludes another option.
    """

    host: str | Sequence[str] = _option(HOST, _HOST_HELP, "host", is_repeatable=True)
    port: int = _option(PORT, "Port to listen on; 0 selects a free port.", "integer", 0, 65535)
    uds: StrPath | None = _option(None, "Unix socket to listen on, instead of host and port.", "path")
    fd: int | None = _option(None, "Descriptor of an inherited listening socket, instead of host and port.", "integer")
    mode: Mode = _option("message", _MODE_HELP, "choice", choices=get_args(Mode))
    chunk_size: int = _option(20, "Bytes requested per read.", "integer", 1, 2**30)
    engine: EngineName = _option("streams", _ENGINE_HELP, "choice", choices=get_args(EngineName))
    backlog: int = _option(512, "Connections not yet accepted; at most net.core.somaxconn.", "integer", 1)
    limit_connections: int | None = _option(
        None, "Concurrent connections; more are refused.", "integer", 1, default_text="fits the descriptor limit"
    )
    limit_message_size: int = _option(1_048_576, "Bytes per message, newline included.", "integer", 1, 2**40)
    timeout_idle: float = _option(600.0, "Seconds until an idle connection is closed.", "seconds")
    timeout_message: float = _option(60.0, "Seconds to complete a message.", "seconds")
    timeout_write: float = _option(30.0, "Seconds until a connection whose peer does not read is closed.", "seconds")
    timeout_graceful_shutdown: float = _option(10.0, "Seconds to drain connections at a graceful shutdown.", "seconds")
    ssl_certfile: StrPath | None = _option(None, "Certificate chain (PEM); enables TLS. Reloaded on SIGHUP.", "file")
    ssl_keyfile: StrPath | None = _option(None, "Private key (PEM), unless the certificate file contains it.", "file")
    ssl_keyfile_password: str | None = _option(None, "Password of the private key.", repr=False)
    ssl_ca_certs: StrPath | None = _option(
        None, "CA certificates (PEM) that must have signed client certificates.", "file"
    )
    ssl_alpn: str | None = _option(None, "ALPN protocols to negotiate, preferred ones first: h2,echo.", "protocols")
    proxy_protocol: ProxyProtocol = _option("off", _PROXY_HELP, "choice", choices=get_args(ProxyProtocol))
    proxy_allow_from: str = _option(LOOPBACK, "Trusted proxies: addresses and networks, or * for all.", "networks")
    udp: bool = _option(False, _UDP_HELP, "flag")
    udp_allow_from: str = _option(LOOPBACK_NETWORKS, _UDP_ALLOW_HELP, "networks")
    labels: Mapping[str, str] | None = _option(None, _LABEL_HELP, "labels", is_repeatable=True, flag="label")
    fault: str | None = _option(None, _FAULT_HELP, "fault")
    fault_sequence: str | Sequence[str | None] | None = _option(None, _SEQUENCE_HELP, "faults")
    fault_seed: int | None = _option(None, _SEED_HELP, "integer", 0, 2**63 - 1, default_text="random, and logged")
    no_access_log: bool = _option(False, "Disable the log line per message.", "flag")

    def __post_init__(self) -> None:
        _validate(self)
        if self.proxy_protocol == "off" and self.proxy_allow_from != LOOPBACK:
            raise ConfigError("proxy_allow_from requires proxy_protocol")
        if not self.udp and self.udp_allow_from != LOOPBACK_NETWORKS:
            raise ConfigError("udp_allow_from requires udp")
        if self.udp and self.uds is not None:
            raise ConfigError("udp conflicts with uds; use host and port")
        if self.uds is not None:
            require_feature(UNIX_SOCKETS, "use uds")
        if self.fd is not None:
            require_feature(DESCRIPTORS, "use fd")
        if self.fd is not None and self.uds is not None:
            raise ConfigError("fd and uds are mutually exclusive")
        self._check_faults()
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_alpn"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} requires ssl_certfile")

    def _check_faults(self) -> None:
        if self.fault is not None and self.fault_sequence is not None:
            raise ConfigError("fault and fault_sequence are mutually exclusive")
        if self.fault_seed is not None and not self.has_faults:
            raise ConfigError("fault_seed requires fault or fault_sequence")
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
class ClientConfig:
    """The configuration of a client. Times are in seconds.

    Raises:
        ConfigError: An option has an invalid value, or requires another option.
    """

    host: str = _option(HOST, "Host name or address of the server.", "host")
    port: int = _option(PORT, "Port of the server.", "integer", 1, 65535)
    uds: StrPath | None = _option(None, "Unix socket of the server, instead of host and port.", "path")
    timeout: float = _option(REPLY_TIMEOUT, "Seconds to wait for each reply.", "seconds")
    connect_timeout: float = _option(CONNECT_TIMEOUT, "Seconds to wait for each connection.", "seconds")
    retry: float = _option(0.0, "Seconds to keep retrying to connect.", "seconds", is_zero_allowed=True)
    ssl: SSLContext | bool | None = _option(None, "Use TLS; implied by every other TLS option.", "flag")
    server_hostname: str | None = _option(None, "Name that the certificate must have.", "host", default_text="the host")
    send_proxy: SentProxyVersion | None = _option(
        None, "Send a PROXY header of this version first, before TLS.", "choice", choices=get_args(SentProxyVersion)
    )
    proxy_source: str | None = _option(
        None, "Client address in the PROXY header, such as 192.0.2.1:40000.", "address", default_text="the real one"
    )

    def __post_init__(self) -> None:
        _validate(self)
        if self.proxy_source is not None and self.send_proxy is None:
            raise ConfigError("proxy_source requires send_proxy")
        if self.uds is not None:
            require_feature(UNIX_SOCKETS, "use uds")
        if self.server_hostname is not None and not self.ssl:
            raise ConfigError("server_hostname requires ssl")
