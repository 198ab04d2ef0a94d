"""A toy project of four stages, which the flow runs in a few seconds; a webhook, and the events of a server."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[1]
TOY: dict[str, dict[str, Any]] = {
    name: {"cmd": f"python -u work.py {name}", "deps": deps, "outs": [f"out/{name}", f"models/runs/{name}"]}
    for name, deps in {
        "first": ["work.py"],
        "second": ["out/first", "fault.txt"],
        "other": ["out/first"],
        "third": ["out/second", "out/other"],
    }.items()
}
TOY["second"]["params"] = ["sft.steps"]
WORK = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C without a traceback, as of the project's own commands
name = sys.argv[1]
print(f"running {name}")
fault = pathlib.Path("fault.txt").read_text() if name == "second" else ""
if fault == "killed":
    os.kill(os.getpid(), 9)
if fault == "slow":
    pathlib.Path("working").write_text(str(os.getpid()))
    time.sleep(600)
if fault:
    print("Traceback (most recent call last): ...", file=sys.stderr)
    print(f"error: data/manifest.csv, row 7: no image", file=sys.stderr)
    sys.exit(2)
pathlib.Path("out").mkdir(exist_ok=True)
pathlib.Path("out", name).write_text(name)
kept = pathlib.Path("models/runs", name)
kept.mkdir(parents=True)
(kept / "metrics.json").write_text(json.dumps({"rows": 12}))
print('metrics: {"rows": 12, "seconds": 0.5, "peak_megabytes": 64.0}')
"""


def make_toy(folder: Path) -> None:
    """Write the project. ``fault.txt`` says what stage ``second`` does: killed, slow (its process id is in ``working``), or fail."""
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    (folder / "params.yaml").write_text("sft:\n  steps: 20\n")
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": TOY}, sort_keys=False))
    (folder / "work.py").write_text(WORK)
    (folder / "fault.txt").write_text("")


class Webhook(ThreadingHTTPServer):
    """A server that keeps the JSON that it gets, with the path of the request as ``path``, and answers with ``status``."""

    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Received)
        self.messages: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def wait_for(self, text: str, seconds: float = 30) -> dict[str, Any]:
        """The only message with ``text`` in its subject, once there is one."""
        end = time.monotonic() + seconds
        while not (found := [message for message in self.messages if text in message["subject"]]):
            assert time.monotonic() < end, self.messages
            time.sleep(0.2)
        assert len(found) == 1, found
        return found[0]


class _Received(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.messages.append({**message, "path": self.path})
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal."""


@contextmanager
def webhook() -> Iterator[Webhook]:
    """A webhook of this machine until the block ends."""
    with Webhook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def events(server: str, name: str, resource: str | None = None, count: int = 1, seconds: float = 15) -> list[dict[str, Any]]:
    """The events of this name, newest first, of a resource if its id is given; waits until there are ``count``."""
    wanted = {"event": {"name": [name]}, **({"resource": {"id": [resource]}} if resource else {})}
    end = time.monotonic() + seconds
    while True:
        answer = httpx.post(f"{server}/events/filter", json={"filter": wanted})
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()["events"]
        if len(found) >= count or time.monotonic() > end:
            return found
        time.sleep(0.5)
