"""The files in deploy/, and the YAML of docs/recipes.md: each is checked with the program that uses it, if installed.

``test_docs.py`` runs the other examples of docs/recipes.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import IO, Any

import pytest
import trustme
from support import TIMEOUT, command_process, haproxy, needs, receive_line, run_process, server_process

from echo_async import Identity, sync
from echo_async.cli.server import command
from echo_async.config import ServerOptions
from echo_async.service.metrics import ServiceCollector
from echo_async.stats import Stats
from echo_async.testing import HostedServer

DEPLOY = Path(__file__).parent.parent / "deploy"
DOCS = DEPLOY.parent / "docs"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
PATH = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def check(*arguments: str | Path) -> None:
    """Run a program that validates a file; it must succeed."""
    done = run_process(arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def yaml_documents(text: str) -> list[Any]:
    yaml = pytest.importorskip("yaml", reason="kubernetes-validate is not installed")
    return list(yaml.safe_load_all(text))


def manifest(path: Path) -> Any:
    [document] = yaml_documents(path.read_text())
    return document


def recipe(key: str, value: str = "") -> Any:
    """The YAML of docs/recipes.md, or of the file that it names, with ``key``, whose value is ``value`` if given."""
    page, probe = (DOCS / "recipes.md").read_text(), (DEPLOY / "network-probe.yaml").read_text()
    texts = [*re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S), probe]
    [found] = [each for each in yaml_documents("---\n".join(texts)) if key in each and value in ("", each[key])]
    return found


@needs("systemd-analyze")
def test_systemd_units_are_valid(tmp_path: Path) -> None:
    socket, service = tmp_path / "echo-async.socket", tmp_path / "echo-async.service"
    shutil.copy(DEPLOY / socket.name, socket)
    text = (DEPLOY / service.name).read_text()
    assert text.count("ExecStart=/opt/echo-async/bin/python ") == 1
    service.write_text(text.replace("/opt/echo-async/bin/python", sys.executable))
    check("systemd-analyze", "verify", "--man=no", socket, service)


def test_systemd_reload_reloads_the_certificates(certificate: Path) -> None:
    [command] = re.findall("^ExecReload=(.+)", (DEPLOY / "echo-async.service").read_text(), re.M)
    with server_process("--workers", "2", "--ssl-certfile", str(certificate)) as server:
        server.wait_for_log("server started")
        subprocess.run(command, shell=True, check=True, env={"MAINPID": str(server.process.pid)}, timeout=TIMEOUT)
        server.wait_for_log("SIGHUP received: certificates reloaded\n")


def wait_for_line(log: IO[str], text: str) -> str:
    while text not in (line := log.readline()):
        assert line, "haproxy ended"
    return line


@needs("haproxy")
def test_log_behind_haproxy_shows_the_client_addresses(tmp_path: Path) -> None:
    text = (DEPLOY / "haproxy.cfg").read_text().replace("maxconn 100000", "maxconn 100")  # fits the descriptor limit
    options = ("--mode", "stream", "--proxy-protocol", "v2")
    with server_process(*options) as first, server_process(*options) as second, ExitStack() as stack:
        for number, server in enumerate((first, second), 1):
            text = text.replace(f"192.0.2.1{number}:5500", "{}:{}".format(*server.address))
        [address], _ = stack.enter_context(haproxy(text, tmp_path))
        for server in (first, second):
            server.wait_for_log(" 8 bytes: healthy")
        client_addresses = set()
        for _ in range(2):  # the second client goes to the other server
            client = stack.enter_context(socket.create_connection(address, TIMEOUT))
            client.sendall(b"Hola Server!\n")
            assert receive_line(client) == b"Hola Server!\n"
            client_addresses.add("{}:{}".format(*client.getsockname()))
        for server in (first, second):
            server.wait_for_log(" 13 bytes: Hola Server!\n")
        assert {*re.findall(r" INFO (\S+) 13 bytes: Hola", first.log + second.log)} == client_addresses


@needs("haproxy")
def test_identify_behind_haproxy_shows_what_haproxy_had(tmp_path: Path) -> None:
    """TLS ends in HAProxy. Its log line has the same facts as the TLVs that it sends."""
    authority = trustme.CA()
    authority.issue_cert("echo.example").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "echo.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    authority.issue_cert("client.example", common_name="Ana").configure_cert(context)
    text = (DEPLOY / "haproxy.cfg").read_text().replace("maxconn 100000", "maxconn 100")
    text = re.sub(r"    server echo-2 .*\n", "", text).replace("check inter", "inter")  # a check would be logged too
    facts = "facts %ID %ci %cp %sslv %sslc %[ssl_fc_sni] %[ssl_c_s_dn(cn)] %[ssl_c_verify]"
    tls = f"bind :5500 ssl crt {tmp_path}/echo.pem ca-file {tmp_path}/ca.pem verify required"
    text = text.replace("bind :5500", f"{tls}\n    log-format '{facts}'").replace("notice", "info")
    with server_process("--mode", "identify", "--proxy-protocol", "v2") as server:
        text = text.replace("192.0.2.11:5500", "{}:{}".format(*server.address))
        with haproxy(text, tmp_path) as ([listening], log):
            plain = socket.create_connection(listening, TIMEOUT)
            with context.wrap_socket(plain, server_hostname="echo.example") as client:
                client.sendall(b"Hola Server!\n")
                identity = Identity.parse(receive_line(client))
                address = client.getsockname()
            line = wait_for_line(log, "facts ")
    unique_id, host, port, version, cipher, name, common_name, verify = line.split("facts ")[1].split()
    assert (identity.client.address, identity.client.port) == address == (host, int(port))
    assert identity.proxy is not None
    tlvs = identity.proxy.tlvs
    assert (tlvs["unique_id"], tlvs["authority"], name) == (unique_id, "echo.example", "echo.example")
    assert re.fullmatch("[0-9a-f]{8}", tlvs["crc32c"])
    assert set(tlvs) == {"unique_id", "authority", "crc32c", "ssl"}
    assert tlvs["ssl"]["client"] == ["ssl", "cert_conn", "cert_sess"]
    assert (tlvs["ssl"]["version"], tlvs["ssl"]["cn"]) == (version, common_name) == ("TLSv1.3", "Ana")
    assert (tlvs["ssl"]["verify"], verify) == (0, "0")
    assert cipher.startswith("TLS_")


@contextmanager
def documented_haproxy(name: str, directory: Path, *servers: tuple[str, int]) -> Iterator[tuple[Any, IO[str]]]:
    """Run a configuration of the docs with other addresses. One without defaults has those of another."""
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    texts = dict(re.findall(r"^<!-- haproxy: ([\w ]+) -->\n```\n(.*?)^```$", pages, re.M | re.S))
    defaults = "" if "defaults\n" in texts[name] else texts["health check"].partition("listen ")[0]
    text = defaults + texts[name]
    for port, (host, actual) in zip((5501, 5502), servers, strict=True):
        assert text.count(f"127.0.0.1:{port}") == 1
        text = text.replace(f"127.0.0.1:{port}", f"{host}:{actual}")
    with haproxy(text, directory) as ([address], log):
        yield address, log


@needs("haproxy")
def test_haproxy_takes_a_faulty_server_out(tmp_path: Path) -> None:
    """After failed checks, every client gets a reply."""
    with (
        server_process("--mode", "stream") as healthy,
        server_process("--mode", "stream", "--fault", "close") as faulty,
        documented_haproxy("health check", tmp_path, healthy.address, faulty.address) as (address, log),
    ):
        wait_for_line(log, "echo/faulty is DOWN")
        assert [sync.echo("Hola Server!", *address) for _ in range(20)] == 20 * ["Hola Server!"]
        assert " 13 bytes: Hola Server!" not in faulty.log


@needs("haproxy")
def test_haproxy_fails_over_from_a_silent_server(tmp_path: Path) -> None:
    with (
        HostedServer() as healthy,
        HostedServer(fault="no-accept") as silent,
        documented_haproxy("failover", tmp_path, healthy.address, silent.address) as (address, _),
    ):
        assert [sync.echo("Hola Server!", *address) for _ in range(4)] == 4 * ["Hola Server!"]
        assert len(healthy.received) == 4


@needs("haproxy")
def test_identify_behind_haproxy_names_server_and_client(tmp_path: Path) -> None:
    with ExitStack() as stack:
        options: ServerOptions = {"mode": "identify", "proxy_protocol": "v2"}
        servers = [stack.enter_context(HostedServer(**(options | {"labels": {"name": name}}))) for name in "ab"]
        address, _ = stack.enter_context(documented_haproxy("identify", tmp_path, *(each.address for each in servers)))
        names = set()
        for _ in range(4):
            with sync.connect(*address) as client:
                identity = client.identify("Hola Server!")
            assert identity.proxy is not None
            assert (identity.client.address, identity.proxy.peer.address) == ("127.0.0.1", "127.0.0.1")
            assert identity.client.port != identity.proxy.peer.port
            names.add(identity.server.labels["name"])
        assert names == {"a", "b"}


def test_kubernetes_manifests_are_valid() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    for each in (*map(manifest, MANIFESTS), recipe("kind", "NetworkPolicy"), recipe("kind", "Job")):
        validate(each, "1.31", strict=True)


def test_deploy_files_agree_with_each_other() -> None:
    found = {path.stem: manifest(path) for path in MANIFESTS}
    labels, pod = {"app.kubernetes.io/name": "echo-async"}, found["deployment"]["spec"]["template"]
    assert pod["metadata"]["labels"] == found["service"]["spec"]["selector"] == labels
    assert found["deployment"]["spec"]["selector"] == found["disruption"]["spec"]["selector"] == {"matchLabels": labels}
    assert found["autoscaler"]["spec"]["scaleTargetRef"]["name"] == found["deployment"]["metadata"]["name"]
    assert pod["spec"]["enableServiceLinks"] is False  # a Service of the same name would set ECHO_ASYNC_PORT
    assert "\nENV ECHO_ASYNC_HOST=::\n" in (DEPLOY / "Containerfile").read_text()  # both families
    unit = (DEPLOY / "echo-async.socket").read_text()
    assert "\nListenStream=5500\n" in unit
    assert "\nBindIPv6Only=both\n" in unit
    [rule] = recipe("kind", "NetworkPolicy")["spec"]["ingress"]
    permitted = rule["from"][0]["podSelector"]["matchLabels"]
    assert recipe("kind", "Job")["spec"]["template"]["metadata"]["labels"] == permitted


def test_environment_variables_in_deploy_files_are_options() -> None:
    known = {f"ECHO_ASYNC_{parameter.name}".upper() for parameter in command.params}
    for name in ("echo-async.service", "Containerfile", "kubernetes/deployment.yaml"):
        used = set(re.findall(r"\bECHO_ASYNC_[A-Z_]+", (DEPLOY / name).read_text()))
        assert used
        assert used <= known


def existing_metrics() -> set[str]:
    """The names of all samples, without those of each listener."""
    certificate = SimpleNamespace(reloads={"success": 0, "failure": 0}, expires_at=0.0)
    service: Any = SimpleNamespace(certificates=[certificate], worker_restarts=0)
    collector = ServiceCollector(service, lambda: [Stats()], {}, [])
    return {sample.name for metric in collector.collect() for sample in metric.samples}


def test_dashboard_queries_exactly_the_existing_metrics() -> None:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queried = {name for query in queries for name in re.findall(r"echo_async_\w+", query)}
    assert queried == {*existing_metrics(), "echo_async_listener_messages_total"}


def test_alerts_query_existing_metrics_and_labels() -> None:
    (group,) = manifest(DEPLOY / "alerts.yaml")["groups"]
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "annotations"}
        assert set(re.findall(r"echo_async_\w+", rule["expr"])) <= existing_metrics()
        assert rule["annotations"]["summary"].endswith(".")
        labels = {"instance", "kind", "reason"}
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= labels


ALERT_SERIES = {
    "EchoDown": ("up", {"job": "echo-async"}, "0x21", "1x21"),
    "EchoConnectionLimit": ("echo_async_connections_refused_total", {}, "0+120x20", "5x21"),
    "EchoInternalErrors": ("echo_async_failures_total", {}, "0+120x20", "5x21"),
    "EchoWorkerRestarts": ("echo_async_worker_restarts_total", {}, "0+120x20", "5x21"),
    "EchoReloadFailed": ("echo_async_certificate_reloads_total", {"result": "failure"}, "0+120x20", "5x21"),
    "EchoCertificateExpires": ("echo_async_certificate_expiry_timestamp_seconds", {}, "86400x21", "9999999x21"),
    "EchoTlsFailures": ("echo_async_tls_failures_total", {}, "0+120x20", "0+30x20"),
    "EchoProxyFailures": ("echo_async_proxy_failures_total", {}, "0+120x20", "5x21"),
    "EchoTimeouts": ("echo_async_timeouts_total", {"kind": "message"}, "0+120x20", "0+30x20"),
    "EchoDatagramsRefused": ("echo_async_datagrams_refused_total", {"reason": "limit"}, "0+1200x20", "0+300x20"),
}
"""The metric of each alert with its labels, and its values once per minute that raise the alert, and that do not."""


@needs("promtool")
def test_alerts_are_raised_by_their_metrics_only(tmp_path: Path) -> None:
    (group,) = manifest(DEPLOY / "alerts.yaml")["groups"]
    assert [rule["alert"] for rule in group["rules"]] == list(ALERT_SERIES)
    tests = []
    for rule in group["rules"]:
        metric, more, raising, quiet = ALERT_SERIES[rule["alert"]]
        labels, summary = {"instance": "server:9100", **more}, rule["annotations"]["summary"]
        for name, value in labels.items():
            summary = summary.replace(f"{{{{ $labels.{name} }}}}", value)
        series = metric + "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
        raised = {"exp_labels": labels, "exp_annotations": {"summary": summary}}
        for values, alerts in ((raising, [raised]), (quiet, [])):
            case = {"eval_time": "15m", "alertname": rule["alert"], "exp_alerts": alerts}
            inputs = [{"series": series, "values": values}]
            tests.append({"interval": "1m", "input_series": inputs, "alert_rule_test": [case]})
    (tmp_path / "test.yaml").write_text(json.dumps({"rule_files": [str(DEPLOY / "alerts.yaml")], "tests": tests}))
    check("promtool", "test", "rules", tmp_path / "test.yaml")


@pytest.mark.parametrize(
    "options",
    [
        {"HOST": "127.0.0.1,::1", "PROXY_PROTOCOL": "auto"},
        {"LISTEN": "unix:echo.sock,proxy-protocol=v1,tls"},
    ],
    ids=str,
)
def test_image_health_check_follows_the_environment(
    options: dict[str, str], tmp_path: Path, certificate: Path, reserved_port: int
) -> None:
    """The server and its health check in a container have the same environment."""
    values = {"PORT": str(reserved_port), "SSL_CERTFILE": str(certificate), **options}
    environment = {f"ECHO_ASYNC_{name}": value for name, value in values.items()}
    with command_process([sys.executable, "-m", "echo_async.server"], environment, cwd=tmp_path) as server:
        environment = {**os.environ, **environment, **PATH}

        def check() -> int:
            return subprocess.run([DEPLOY / "healthcheck"], env=environment, cwd=tmp_path, timeout=TIMEOUT).returncode

        assert any(check() == 0 for _ in range(3))  # as containers retry it: on a busy machine its 2 s can be too short
        server.process.kill()
        server.wait(None)
        assert check() == 3


def run_client(command: list[str], host: str, port: int | None) -> CompletedProcess[str]:
    """Run a client command of the page with another address: the last ``--host`` counts."""
    assert command[:2] == ["echo-async", "client"]
    return run_process([*command, "--host", host], env={**os.environ, **PATH, "ECHO_ASYNC_PORT": str(port)})


def test_compose_health_check_follows_the_server(reserved_port: int) -> None:
    services = recipe("services")["services"]
    kind, *command = services["echo"]["healthcheck"]["test"]
    assert kind == "CMD"
    assert services["tests"]["depends_on"] == {"echo": {"condition": "service_healthy"}}
    with HostedServer(port=reserved_port) as server:
        assert run_client(command, *server.address).returncode == 0
        assert run_client(services["tests"]["command"], *server.address).stdout == "Hola Server!\n"
    assert run_client(command, *server.address).returncode == 3


def test_github_steps_print_every_reply(tmp_path: Path, reserved_port: int) -> None:
    """Each step is a shell of its own, with the options that a runner gives to bash."""
    steps = [step["run"] for step in recipe("steps")["steps"]]
    script = 'for step; do bash -e -o pipefail -c "$step" || exit; done'
    environment = {**os.environ, **PATH, "ECHO_ASYNC_PORT": str(reserved_port)}
    done = run_process(["bash", "-c", script, "runner", *steps], cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (0, "Hola Server!\nready?\none\ntwo\n")


def test_network_probe_exit_code_shows_the_policy(black_hole_address: tuple[str, int]) -> None:
    command = recipe("kind", "Job")["spec"]["template"]["spec"]["containers"][0]["command"]
    with HostedServer() as server:
        assert run_client(command, *server.address).returncode == 0
    blocked = run_client([*command, "--connect-timeout", "0.2"], *black_hole_address)
    assert (blocked.returncode, json.loads(blocked.stdout)["error"]["kind"]) == (3, "timeout")
