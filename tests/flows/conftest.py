"""One Prefect server for all flow tests: starting it takes about ten seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cm3leon.services.environment import use_environment


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a server with an empty database of its own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
    patch.delenv("PREFECT_API_URL", raising=False)
    use_environment()
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()
    patch.undo()
    os.environ.pop("PREFECT_API_URL", None)
