"""The YAML of docs/recipes.md is valid, and its commands do what the page describes.

``test_docs.py`` runs the other examples of the page.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import TIMEOUT, ChildProcess

from echo_async.testing import HostedServer

ROOT = Path(__file__).parent.parent


def recipe(key: str, value: str = "") -> Any:
    """The YAML of the page, or of the file that it names, that has ``key``, with ``value`` unless it is empty."""
    yaml = pytest.importorskip("yaml", reason="kubernetes-validate is not installed")
    page = (ROOT / "docs" / "recipes.md").read_text()
    texts = [*re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S), (ROOT / "deploy/network-probe.yaml").read_text()]
    blocks = (block for text in texts for block in yaml.safe_load_all(text))
    (found,) = (block for block in blocks if key in block and value in ("", block[key]))
    return found


def environment(port: int | None) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ECHO_ASYNC_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**inherited, "ECHO_ASYNC_PORT": str(port), "PATH": path}


def run_client(command: list[str], host: str, port: int | None) -> subprocess.CompletedProcess[str]:
    """Run a client command of the page with another address: the last ``--host`` counts."""
    assert command[:2] == ["echo-async", "client"]
    arguments = [*command, "--host", host]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT, env=environment(port))


def test_compose_health_check_follows_the_server(reserved_port: int) -> None:
    services = recipe("services")["services"]
    kind, *command = services["echo"]["healthcheck"]["test"]
    assert kind == "CMD"
    assert services["tests"]["depends_on"] == {"echo": {"condition": "service_healthy"}}
    with HostedServer(port=reserved_port) as server:
        assert run_client(command, *server.address).returncode == 0
        assert run_client(services["tests"]["command"], *server.address).stdout == "Hola Server!\n"
    assert run_client(command, *server.address).returncode == 3


def test_github_steps_print_every_reply(tmp_path: Path) -> None:
    """Each step is a shell of its own, with the options that a runner gives to bash."""
    steps = [step["run"] for step in recipe("steps")["steps"]]
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        variables = environment(reserved.getsockname()[1])
        script = 'for step; do bash -e -o pipefail -c "$step" || exit; done'
        command = ["bash", "-c", script, "runner", *steps]
        with ChildProcess(
            command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=variables, start_new_session=True
        ) as runner:
            try:
                output, _ = runner.communicate(timeout=TIMEOUT)
                assert (runner.returncode, output) == (0, "Hola Server!\nready?\none\ntwo\n")
            finally:
                with suppress(ProcessLookupError):  # the server ran until the end of the job
                    os.killpg(runner.pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["NetworkPolicy", "Job"])
def test_kubernetes_recipe_is_valid(kind: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    validate(recipe("kind", kind), "1.31", strict=True)


def test_network_policy_permits_the_label_of_the_probe() -> None:
    (rule,) = recipe("kind", "NetworkPolicy")["spec"]["ingress"]
    permitted = rule["from"][0]["podSelector"]["matchLabels"]
    assert recipe("kind", "Job")["spec"]["template"]["metadata"]["labels"] == permitted


def test_network_probe_exit_code_shows_the_policy(black_hole_address: tuple[str, int]) -> None:
    command = recipe("kind", "Job")["spec"]["template"]["spec"]["containers"][0]["command"]
    with HostedServer() as server:
        assert run_client(command, *server.address).returncode == 0
    blocked = run_client([*command, "--connect-timeout", "0.2"], *black_hole_address)
    assert (blocked.returncode, json.loads(blocked.stdout)["error"]["kind"]) == (3, "timeout")
