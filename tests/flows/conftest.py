"""One Prefect server for all flow tests."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cm3leon.services.environment import use_environment
from cm3leon.services.local import temporary_prefect

ERROR = re.compile(r"\bERROR\b|\bCRITICAL\b|^Traceback|^\S*(Error|Exception): ", re.MULTILINE)
RECORD = re.compile(r"^\S+ \| .*?(?=^\S+ \| |\Z)", re.MULTILINE | re.DOTALL)
LATER = ("Worker channel heartbeat persistence failed", "database is locked")
"""On SQLite a background service may meet another write for too long, on a busy machine; it does the same again seconds later."""


def assert_no_errors(log: Path) -> None:
    """Fail if a server has logged an error: pip check, the API and the pages are silent about those of its background services."""
    text = RECORD.sub(lambda record: "" if any(found in record[0] for found in LATER) else record[0], log.read_text(errors="replace"))
    if found := ERROR.search(text):
        pytest.fail(f"{log} has an error:\n{text[max(0, found.start() - 500) : found.start() + 4000]}", pytrace=False)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory, prepared_prefect: Path) -> Iterator[str]:
    """The API address of a server with an empty database of its own; an error in its log fails the last test."""
    home = tmp_path_factory.mktemp("prefect")
    shutil.copyfile(prepared_prefect, home / "prefect.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.delenv("PREFECT_API_URL", raising=False)
        use_environment()
        from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

        from flows.session import send_pending

        with temporary_prefect(home) as url, temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: home}):
            yield url
            send_pending()
    assert_no_errors(home / "temporary-server.log")
