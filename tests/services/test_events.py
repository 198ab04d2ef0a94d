"""Without a server that takes an event, the error says what to do; that one takes it, with a password, is in ``test_stack.py``."""

from __future__ import annotations

import pytest

from cm3leon.services.environment import ServerError
from cm3leon.services.events import emit
from cm3leon.services.local import free_port


def test_without_a_server_the_error_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ServerError, match=r"no Prefect server .* start one \(cm3leon up, or cm3leon ui\), or set PREFECT_API_URL"):
        emit("cm3leon.test", {"prefect.resource.id": "test"}, {})


def test_a_server_that_does_not_answer_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://me:secret@127.0.0.1:{free_port(0)}/api")
    with pytest.raises(ServerError, match=r"has not taken the event cm3leon\.test: it does not answer .*; start it") as caught:
        emit("cm3leon.test", {"prefect.resource.id": "test"}, {})
    assert "secret" not in str(caught.value)
