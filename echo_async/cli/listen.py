"""``--listen``: the address and the options of one listener as a text, ``ADDRESS[,OPTION[=VALUE]]...``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ADDRESS_OPTIONS, FLAG, Kind, Option, ServerConfig, lacks_required, options_of
from ..errors import ConfigError
from ..server.listeners import ListenerConfig

LISTEN = Option(
    None,
    "Address of a listener and its own options, such as 5501,tls or [::]:5502,mode=raw. Can be given several times.",
    Kind("SPEC", combine=list, split=str.split),
)
SERVER_OPTIONS = options_of(ServerConfig)
SHARED = {*ADDRESS_OPTIONS, "engine", "backlog", *(name for name in SERVER_OPTIONS if name.startswith("ssl_"))}
OPTIONS = {
    "tls": Option(False, "Use TLS, with the files of the --ssl options.", FLAG),
    **{name: option for name, option in SERVER_OPTIONS.items() if name not in SHARED},
}
NAMES = {(option.flag or name).replace("_", "-"): name for name, option in OPTIONS.items()}
DEFAULTS = {name: option.default for name, option in SERVER_OPTIONS.items()}
FAULTS = {"fault", "fault_sequence"}  # mutually exclusive

ADDRESS = re.compile(r"unix:(?P<uds>.+)|fd:(?P<fd>.+)|((\[(?P<ipv6>[^]]+)\]|(?P<host>[^][:]+)):)?(?P<port>[0-9]+)")
ADDRESS_FORMS = "PORT, HOST:PORT, [ADDRESS]:PORT, unix:PATH, fd:NAME or fd:NUMBER"


def parse_listeners(
    source: str, specs: Sequence[str], values: Mapping[str, Any], inherited: Mapping[int, str]
) -> list[ListenerConfig]:
    """Return the configuration of the listener of each of ``specs``, which are those of the option ``source``.

    ``values`` are the fields of ``ServerConfig`` that a spec does not have. ``inherited`` are the descriptors and names
    of inherited sockets, each of which has to belong to a listener.
    """
    listeners: list[ListenerConfig] = []
    for spec in specs:
        try:
            listener = _parse(spec, values, inherited)
            if any(_is_same_address(listener, each) for each in listeners):
                raise ConfigError("another listener has this address")
        except ConfigError as error:
            raise ConfigError(f"invalid {source}: {spec!r} ({error})") from None
        listeners.append(listener)
    served = {number for each in listeners for number in each.descriptors}
    if unused := {f"fd:{name}": None for number, name in inherited.items() if number not in served}:
        raise ConfigError(f"{source} does not include all inherited sockets; add {', '.join(unused)}")
    return listeners


def _parse(spec: str, values: Mapping[str, Any], inherited: Mapping[int, str]) -> ListenerConfig:
    address, *items = spec.split(",")
    location, descriptors = _parse_address(address, inherited)
    if location["uds"]:
        values = {**values, "udp": False}
    merged = _merge(values, _parse_options(items))
    return ListenerConfig(ServerConfig(**{**merged, **location}), descriptors)


def _parse_address(text: str, inherited: Mapping[int, str]) -> tuple[dict[str, Any], list[int]]:
    """Return the fields of ``ServerConfig`` for an address, and the inherited sockets, if it is the name of these."""
    found = ADDRESS.fullmatch(text)
    if found is None:
        raise ConfigError(f"the address must be {ADDRESS_FORMS}")
    location = {name: DEFAULTS[name] for name in ADDRESS_OPTIONS}
    if found["uds"]:
        return {**location, "uds": found["uds"]}, []
    if found["port"]:
        port = int(found["port"])
        if requirement := SERVER_OPTIONS["port"].violation(port):
            raise ConfigError(f"port: {requirement}")
        return {**location, "host": found["ipv6"] or found["host"] or location["host"], "port": port}, []
    name = found["fd"]
    descriptors = [int(name)] if name.isdecimal() else [number for number in inherited if inherited[number] == name]
    if not descriptors:
        names = ", ".join(dict.fromkeys(inherited.values())) or "none"
        raise ConfigError(f"no inherited socket has this name; LISTEN_FDNAMES has {names}")
    return {**location, "fd": descriptors[0]}, descriptors


def _parse_options(items: Sequence[str]) -> dict[str, Any]:
    texts: dict[str, list[str]] = {}
    for item in items:
        key, has_value, text = item.partition("=")
        if key not in NAMES:
            raise ConfigError(f"unknown option {key!r}; choose from {', '.join(NAMES)}")
        texts.setdefault(key, []).append(text if has_value else "true")
    given = {}
    for key, values in texts.items():
        option = OPTIONS[NAMES[key]]
        if len(values) > 1 and option.kind.combine is None:
            raise ConfigError(f"{key} is given twice")
        value = given[NAMES[key]] = option.kind.parse(values)
        if requirement := option.violation(value):
            raise ConfigError(f"{key}: {requirement}")
    return given


def _merge(values: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are ``given``, and of ``values`` those that the listener can use with them."""
    merged = {**values, **given}
    if values["labels"] and merged["labels"]:
        merged["labels"] = {**values["labels"], **merged["labels"]}
    unused = FAULTS - given.keys() if given.keys() & FAULTS else set()
    if not merged.pop("tls", False):
        unused.add("ssl_certfile")
    elif merged["ssl_certfile"] is None:
        raise ConfigError("tls requires --ssl-certfile")
    merged |= {name: DEFAULTS[name] for name in unused}
    lacking = {name for name, option in SERVER_OPTIONS.items() if lacks_required(option, SERVER_OPTIONS, merged)}
    return {**merged, **{name: DEFAULTS[name] for name in lacking - given.keys()}}


def _is_same_address(one: ListenerConfig, other: ListenerConfig) -> bool:
    """Whether two listeners are for the same address; each with port 0 gets a port of its own."""
    first, second = ({name: getattr(each.config, name) for name in ADDRESS_OPTIONS} for each in (one, other))
    return not {*one.descriptors}.isdisjoint(other.descriptors) or (first == second and first["port"] != 0)
