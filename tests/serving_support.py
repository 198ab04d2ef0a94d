"""A real server in a thread, on a free port of 127.0.0.1, and its client, for tests."""

import base64
import inspect
import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import uvicorn
from PIL import Image

from cm3leon.serving.app import IMAGES_ROUTE, create_app
from cm3leon.serving.batching import Loaded, Worker
from cm3leon.serving.metrics import Metrics
from cm3leon.serving.server import OPTIONS, Server


def encoded(image):
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def opened(value):
    return Image.open(io.BytesIO(base64.b64decode(value)))


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


RED = Image.new("RGB", (40, 30), "red")
RED_PNG = encoded(RED)


def ask_all(running, bodies, path=IMAGES_ROUTE):
    """Answers to requests sent at the same time, as futures."""
    pool = ThreadPoolExecutor(len(bodies))
    asked = [pool.submit(running.client.post, path, json=body) for body in bodies]
    pool.shutdown(wait=False)
    return asked


class Connection:
    """A server at ``url`` and its ``client``."""

    def __init__(self, url):
        self.url, self.client = url, httpx.Client(base_url=url, timeout=30, trust_env=False)

    def until(self, condition, seconds=10):
        """Wait until a condition is true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition did not become true"
            time.sleep(0.005)

    def healthy(self):
        """True if it answers requests."""
        try:
            return self.client.get("/health").status_code == 200
        except httpx.ConnectError:
            return False


class Running(Connection):
    """A server in a thread."""

    def __init__(self, load, drain_seconds=20.0, **limits):
        listener = socket.create_server(("127.0.0.1", 0))
        super().__init__(f"http://127.0.0.1:{listener.getsockname()[1]}")
        self.worker = Worker(lambda: Loaded(load()), Metrics(), "tiny", **limits)
        config = uvicorn.Config(create_app(self.worker), log_level="critical", **OPTIONS)
        self.server = Server(config, self.worker, drain_seconds)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})


class Held:
    """The real generator; its calls are recorded, and wait until ``let_go`` is set."""

    def __init__(self, generator):
        self.generator, self.let_go, self.calls = generator, threading.Event(), []

    def __getattr__(self, name):
        value = getattr(self.generator, name)
        if not inspect.ismethod(value):
            return value

        def call(*columns, **settings):
            self.calls.append((name, [list(column) for column in columns], settings))
            assert self.let_go.wait(20)
            return value(*columns, **settings)

        return call


@contextmanager
def starting(load, **options):
    """A server of the generator that ``load`` returns, as soon as it listens; it is stopped at the end."""
    running = Running(load, **options)
    running.thread.start()
    try:
        running.until(lambda: running.server.started)
        yield running
    finally:
        running.server.signals = 2
        running.thread.join(20)
        running.client.close()
    assert not running.thread.is_alive()


@contextmanager
def serving(generator, **options):
    """A server of ``generator`` that answers requests; it is stopped at the end."""
    with starting(lambda: generator, **options) as running:
        running.until(running.healthy)
        yield running
