"""``cm3leon serve``: one process that loads a model and answers over HTTP until SIGTERM or Ctrl-C.

At the signal new requests get 503, those in the queue are answered within a time limit, and the process ends with status 0. A second signal
ends it at once.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from cm3leon.generation.generator import Generator
from cm3leon.generation.parts import Precision
from cm3leon.registry.registry import find_bundle, pinned
from cm3leon.serving.app import LOOPBACK, create_app
from cm3leon.serving.batching import Loaded, State, Worker
from cm3leon.serving.following import Follower, say, version_in
from cm3leon.serving.metrics import Metrics

OPTIONS: dict[str, Any] = {
    "ws": "none", "lifespan": "off", "access_log": False, "server_header": False, "timeout_graceful_shutdown": 10
}  # fmt: skip
"""Options of uvicorn."""

WARNING = "warning: --host {host}: whoever reaches this address can use the model; there is no authentication and no encryption"


class Server(uvicorn.Server):
    """A server that answers queued requests before it stops."""

    def __init__(self, config: uvicorn.Config, worker: Worker, drain_seconds: float) -> None:
        super().__init__(config)
        self.worker, self.drain_seconds = worker, drain_seconds
        self.signals = 0
        self._deadline = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then load the model."""
        await super().startup(sockets)
        self.worker.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal; :meth:`on_tick` acts on it."""
        self.signals += 1
        self.force_exit = self.signals > 1

    async def on_tick(self, counter: int) -> bool:
        """True to stop; uvicorn asks ten times a second."""
        if self.signals and self.worker.state is not State.STOPPING:
            self.worker.close()
            self._deadline = time.monotonic() + self.drain_seconds
        stopping = self.worker.state is State.STOPPING
        late = self.force_exit or time.monotonic() > self._deadline
        if stopping and late:
            self.worker.abandon()
        return await super().on_tick(counter) or self.worker.failure is not None or (stopping and (late or self.worker.idle))


def name_of(model: str) -> str:
    """The default id of a served model: ``cm3leon@champion`` of a registered one, the directory's name of a bundle."""
    return model.removeprefix("models:/") if model.startswith("models:/") else Path(model).resolve().name


def run(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    name: str | None = None,
    precision: Precision | None = None,
    compiled: bool = False,
    capacity: int = 64,
    drain_seconds: float = 60.0,
    follow_seconds: float = 30.0,
) -> None:
    """Serve a model until a signal.

    Args:
        model: a registered model (``models:/NAME@ALIAS``) or a bundle directory.
        name: the served model's id; None: as :func:`name_of`.
        precision, compiled: see :func:`~cm3leon.generation.parts.load_decoder`.
        capacity: most requests in the queue; more are answered 429.
        drain_seconds: how long queued requests are still answered after a signal.
        follow_seconds: how often to look whether the alias names another version, which then replaces the served one; 0: never.

    Raises:
        NotRegisteredError, FileNotFoundError: if there is no such model.
    """
    local = host in LOOPBACK
    if not local:
        say(WARNING.format(host=host))
    served = name or name_of(model)

    def load(pinned_model: str) -> Loaded:
        loaded = Loaded(Generator.from_bundle(find_bundle(pinned_model), precision=precision, compiled=compiled), version_in(pinned_model))
        say(f"serving {served}" + (f", version {loaded.version}" if loaded.version else ""))
        return loaded

    worker = Worker(lambda: load(pinned(model)), Metrics(), served, capacity=capacity)
    follower = Follower(worker, model, load, follow_seconds)
    if follow_seconds > 0 and model.startswith("models:/") and "@" in model:
        follower.start()
    Server(uvicorn.Config(create_app(worker, LOOPBACK if local else None), host, port, **OPTIONS), worker, drain_seconds).run()
    follower.stopped.set()
    if worker.failure is not None:
        raise worker.failure
    if not worker.join(seconds=1):
        # The thread is still in the model, and would crash the process if the interpreter ended under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
