"""With any proxy in the environment local servers are reached directly, by each client that Prefect and MLflow use."""

import asyncio
import http.server
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from cm3leon.utils.network import LOCAL_HOSTS, reach_local_servers

PROXIES = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"]
DEAD = ["http://127.0.0.2:9", "socks5://127.0.0.2:9", "socks4://user:secret@127.0.0.2:9"]


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}/"
        found.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*PROXIES, "https_proxy", "no_proxy", "NO_PROXY"]:
        monkeypatch.setenv(name, "restored")  # so that what the function sets is undone
        monkeypatch.delenv(name)


@pytest.mark.parametrize("proxy", DEAD)
@pytest.mark.parametrize("variable", PROXIES)
def test_a_dead_proxy_does_not_stand_before_a_local_server(
    variable: str, proxy: str, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import httpx
    import requests

    monkeypatch.setenv(variable, proxy)
    reach_local_servers()
    assert urllib.request.urlopen(server, timeout=5).status == 200
    assert requests.get(server, timeout=5).status_code == 200
    assert httpx.get(server, timeout=5).status_code == 200
    assert asyncio.run(get(server)) == 200
    warning = capsys.readouterr().err
    assert "secret" not in warning
    assert (variable in warning) == (not proxy.startswith("http"))


async def get(url: str) -> int:
    import httpx

    async with httpx.AsyncClient() as client:
        return (await client.get(url, timeout=5)).status_code


@pytest.mark.parametrize(
    ("listed", "expected"), [({}, ""), ({"NO_PROXY": "a.org, b.org"}, "a.org,b.org,"), ({"no_proxy": "c.org"}, "c.org,")]
)
def test_hosts_that_the_user_lists_stay(listed: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in listed.items():
        monkeypatch.setenv(name, value)
    reach_local_servers()
    reach_local_servers()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == expected + ",".join(LOCAL_HOSTS)


def test_a_star_already_means_every_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    reach_local_servers()
    assert os.environ["NO_PROXY"] == "*"


def test_commands_that_use_a_local_server_are_ready(server: str) -> None:
    """What the flow and the stages call first."""
    code = "import cm3leon.{} as m; m.{}(); import httpx; print(httpx.get({!r}, timeout=5).status_code)"
    for module, function in [("services.environment", "use_environment"), ("tracking.store", "use_settings")]:
        command = code.format(module, function, server)
        environment = {**os.environ, "HTTP_PROXY": DEAD[0], "ALL_PROXY": DEAD[1]}
        assert (
            subprocess.run([sys.executable, "-c", command], env=environment, check=True, capture_output=True, text=True).stdout == "200\n"
        )
