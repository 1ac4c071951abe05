"""The replies in ``identify`` mode without IO: valid JSON in one line for any message, and bounded."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_async import ReplyDifferent
from echo_async.wire.identity import (
    Address,
    ClientCertificate,
    Describer,
    Identity,
    Kubernetes,
    Proxy,
    Responder,
    Tls,
    check_reply,
    max_reply_size,
)

KEYS = ["bytes", "number", "server", "kubernetes", "client", "proxy", "tls"]


def describer(proxy: Proxy | None = None, tls: Tls | None = None, labels: dict[str, str] | None = None) -> Describer:
    server = Responder("host", 42, "127.0.0.1:5500", "0.1.0", "streams", labels or {})
    return Describer(server, Kubernetes(), Address("192.0.2.1", 4711), proxy, tls)


messages = st.binary(max_size=200).map(lambda data: data.replace(b"\n", b"") + b"\n")


@given(messages, st.integers(1, 2**40))
def test_any_message_is_reported_in_one_line_of_json(message: bytes, number: int) -> None:
    line = describer().describe(message, number)
    assert (line.count(b"\n"), line[-1:]) == (1, b"\n")
    values = json.loads(line)
    assert next(iter(values)) in ("message", "message_base64")
    assert list(values)[1:] == KEYS
    identity = check_reply(line, message, "server")
    assert (identity.bytes, identity.number) == (len(message), number)
    assert len(line) <= max_reply_size(message)


def test_message_is_text_or_base64() -> None:
    for message, text in {
        b"Hola Server!\n": "Hola Server!",
        "¡ñandú! 😀\n".encode(): "¡ñandú! 😀",
        b'"quoted"\\\t\x00\r\n': '"quoted"\\\t\x00\r',
        b"\n": "",
    }.items():
        assert json.loads(describer().describe(message, 1))["message"] == text
    identity = Identity.parse(describer().describe(b"\xff\xfe\n", 1))
    assert (identity.message, identity.message_base64) == (None, "//4=")


def header_with(tlvs: dict[str, Any], **attributes: Any) -> Any:
    """A PROXY header with these fields."""
    return SimpleNamespace(**{"version": 0, "source": None, "destination": None, "tlvs": tlvs, **attributes})


def test_message_of_one_mebibyte_is_reported() -> None:
    for message in (2**20 * b"x" + b"\n", 2**20 * b"\xff" + b"\n", 2**20 * b"\0" + b"\n"):
        line = describer().describe(message, 1)
        check_reply(line, message, "server")
        assert len(line) <= max_reply_size(message)
    assert len(describer().describe(2**20 * b"x" + b"\n", 1)) <= 2**20 + 1 + 16 * 1024


def test_details_are_bounded_whatever_the_header_and_the_certificate_are() -> None:
    address = "\0" + "\x01" * 107
    fields = {f"{kind:#04x}": "ab" * 300 for kind in range(200)} | {"authority": "\x01" * 60_000}
    header = header_with(fields, source=address, destination=address)
    long = 400 * "\x01"
    certificate = {
        "subject": tuple(((("commonName", long),),) * 30),
        "subjectAltName": 500 * (("DNS", long),),
        "serialNumber": "01",
    }
    tls = Tls("TLSv1.3", "TLS_AES_256_GCM_SHA384", 255 * "x", 255 * "\x01", ClientCertificate.of(certificate))
    line = describer(Proxy.of(("192.0.2.9", 1), header), tls, {"key": 1000 * "\\"}).describe(b"x\n", 1)
    assert len(line) <= 2 + 16 * 1024
    tlvs = json.loads(line)["proxy"]["tlvs"]
    assert tlvs["0x00"] == "ab" * 300
    assert "0xc7" in tlvs["omitted"] or tlvs["omitted"][-1] == "..."


texts = st.text(max_size=400) | st.sampled_from(["\0", "\\", '"', "\udcff", "ñ", "x"]).map(lambda each: each * 400)


@settings(max_examples=40)
@given(texts, st.lists(texts, max_size=20), st.dictionaries(st.text(max_size=10), texts | st.lists(texts), max_size=30))
def test_details_of_any_texts_are_bounded(text: str, names: list[str], tlvs: dict[str, Any]) -> None:
    """Every text that a client, a proxy or the environment chooses, at its worst in JSON."""
    header = header_with(tlvs, source=text[:108], destination=text[:108])
    certificate = ClientCertificate.of({"subjectAltName": [("DNS", name) for name in names]})
    tls = Tls(None, None, text[:255], text[:255], certificate)
    server = Responder("host", 42, "127.0.0.1:5500", "0.1.0", "streams", {"label": 1018 * text[:1]})
    kubernetes = Kubernetes.of(dict.fromkeys(("POD_NAME", "NAMESPACE", "NODE_NAME", "POD_IP", "SERVICE_NAME"), text))
    describe = Describer(server, kubernetes, Address.of(text), Proxy.of(text, header), tls).describe
    line = describe(b"x\n", 2**63)
    assert len(line) <= 2 + 16 * 1024
    assert line.count(b"\n") == 1
    Identity.parse(line)


def test_tlvs_that_fit_are_all_reported() -> None:
    header = header_with({"authority": 12_000 * "x", "ssl": {"client": [], "verify": 0}})
    line = describer(Proxy.of(("192.0.2.9", 1), header)).describe(b"x\n", 1)
    assert json.loads(line)["proxy"]["tlvs"] == header.tlvs


def test_certificate_is_described_by_subject_names_and_serial() -> None:
    certificate = {
        "subject": ((("countryName", "AR"),), (("organizationName", "Ñandú"),), (("commonName", "client"),)),
        "subjectAltName": (("DNS", "client.example"), ("IP Address", "192.0.2.1")),
        "serialNumber": "0A1B",
    }
    described = ClientCertificate.of(certificate)
    assert described == ClientCertificate(
        "C=AR,O=Ñandú,CN=client", ["DNS:client.example", "IP Address:192.0.2.1"], "0A1B"
    )
    hostile = {"subject": ((("organizationName", 'x,CN=admin+"\\'),), (("commonName", "client"),))}
    assert ClientCertificate.of(hostile).subject == 'O=x\\,CN=admin\\+\\"\\\\,CN=client'


def test_kubernetes_metadata_comes_from_the_environment() -> None:
    names = {"POD_NAME": "p", "POD_NAMESPACE": "ns", "NODE_NAME": "n", "POD_IP": "10.0.0.1", "SERVICE_NAME": "s"}
    assert Kubernetes.of({}) == Kubernetes.of({"POD_NAME": ""}) == Kubernetes()
    assert Kubernetes.of({"NAMESPACE": "a"}) == Kubernetes(namespace="a")
    assert Kubernetes.of({"NAMESPACE": "a", **names}) == Kubernetes("p", "ns", "n", "10.0.0.1", "s")


def test_address_of_a_socket_is_described() -> None:
    assert Address.of(("192.0.2.1", 4711)) == Address.of(("::ffff:192.0.2.1", 4711, 0, 0)) == Address("192.0.2.1", 4711)
    assert Address.of(("2001:db8::1", 4711, 0, 0)) == Address("2001:db8::1", 4711)
    assert Address.of("/run/echo") == Address("/run/echo", None)
    assert Address.of(b"\0abstract") == Address("\0abstract", None)
    assert Address.of("") == Address.of(None) == Address()
    assert Address.of(400 * "\x01") == Address(47 * "\x01" + "...")  # in JSON, a control character takes six bytes


INVALID: list[dict[str, Any]] = [
    {"message": 5},
    {"message": ["x"]},
    {"message": "\ud800"},
    {"message": None},
    {"message": None, "message_base64": "!"},
    {"message": None, "message_base64": 5},
    {"bytes": "2"},
    {"bytes": float("inf")},
    {"number": True},
    {"server": None},
    {"server": {"pid": "1", "labels": {}}},
    {"server": {"labels": {"zone": 1}}},
    {"kubernetes": {"pod": 1}},
    {"client": {"address": 5}},
    {"proxy": []},
    {"proxy": {"version": 2, "peer": {}, "source": {}, "destination": {}, "tlvs": None}},
    {"tls": {"client_certificate": []}},
    {"tls": {"client_certificate": {"sans": "x"}}},
]


def test_other_replies_are_no_identity() -> None:
    values = json.loads(describer().describe(b"x\n", 1))
    others = [b"", b"Hola\n", b"{}\n", b"[]\n", b'{"message": "x"}\n', b"\xff\n", 16_000 * b"["]
    for line in (*others, *(json.dumps({**values, **changes}).encode() for changes in INVALID)):
        with pytest.raises(ReplyDifferent, match=r"invalid reply: not an identify reply.*is server in identify mode"):
            check_reply(line, b"x\n", "server")


def test_reply_of_another_version_is_parsed() -> None:
    values = json.loads(describer().describe(b"x\n", 1))
    del values["server"]["engine"]
    values["server"]["region"] = values["region"] = "new"
    identity = check_reply(json.dumps(values).encode(), b"x\n", "server")
    assert (identity.server.hostname, identity.server.engine) == ("host", None)


def test_another_message_is_a_different_reply() -> None:
    line = describer().describe(b"x\n", 1)
    for sent in (b"y\n", b"xx\n", b"\n"):
        with pytest.raises(ReplyDifferent, match="reply of server reports another message: b'x'"):
            check_reply(line, sent, "server")


def test_parsed_identity_equals_what_was_described() -> None:
    header = header_with({"ssl": {"client": ["ssl"], "verify": 0}}, version=2, source=("192.0.2.1", 4711))
    proxy: Any = Proxy.of(("192.0.2.9", 1), header)
    tls = Tls("TLSv1.3", "AES", "echo.example", None, ClientCertificate("CN=x", ["DNS:x"], "01"))
    identity = Identity.parse(describer(proxy, tls, {"zone": "a"}).describe(b"x\n", 7))
    assert (identity.proxy, identity.tls, identity.number) == (proxy, tls, 7)
    assert (identity.server.labels, identity.client.port) == ({"zone": "a"}, 4711)
