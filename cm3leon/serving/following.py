"""Which version of a registered model is served: the one that its alias names, also after a promotion."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from cm3leon.registry.registry import pinned
from cm3leon.serving.batching import Loaded, State, Worker


def version_in(pinned_model: str) -> str | None:
    """The number in ``models:/NAME/VERSION``; None of a directory."""
    return pinned_model.rpartition("/")[2] if pinned_model.startswith("models:/") else None


def say(message: str) -> None:
    """One line on standard error."""
    print(message, file=sys.stderr, flush=True)


class Follower(threading.Thread):
    """A thread that looks where an alias points, loads a new version beside the served one, and then has the worker use it.

    A registry that does not answer, or a version that cannot be loaded, is a warning, and the served version goes on.

    Args:
        model: ``models:/NAME@ALIAS``.
        load: loads a model that is named by its number.
        seconds: between two looks.
    """

    def __init__(self, worker: Worker, model: str, load: Callable[[str], Loaded], seconds: float) -> None:
        super().__init__(name="follower", daemon=True)
        self.worker, self.model, self.load, self.seconds = worker, model, load, seconds
        self.warned = ""
        self.stopped = threading.Event()

    def run(self) -> None:
        """Look until :attr:`stopped` is set."""
        while not self.stopped.wait(self.seconds):
            if self.worker.state is State.READY:
                self.look()

    def look(self) -> None:
        """Look once."""
        try:
            model = pinned(self.model)
            if version_in(model) != self.worker.version:
                self.worker.use(self.load(model))
            self.warned = ""
        except Exception as error:  # of the registry, the network, the disk or the model: none may end the server
            if str(error) != self.warned:
                say(f"warning: {self.model}: version {self.worker.version} is served on, because {error}")
            self.warned = str(error)
