"""Events of Prefect, and other requests to the HTTP API of its server: the library does not import Prefect (ARCHITECTURE.md)."""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any

from cm3leon.services.environment import ServerError
from cm3leon.tracking.store import without_password

NO_SERVER = "there is no Prefect server to send an event to; start one (cm3leon up, or cm3leon ui), or set PREFECT_API_URL"


def server_address(environment: Mapping[str, str] = os.environ) -> str:
    """The API address of the server that the environment names (:func:`~cm3leon.services.environment.use_environment`).

    Raises:
        ServerError: if it names none.
    """
    if not (address := environment.get("PREFECT_API_URL")):
        raise ServerError(NO_SERVER)
    return address.rstrip("/")


def emit(event: str, resource: Mapping[str, str], payload: Mapping[str, Any], related: Sequence[Mapping[str, str]] = ()) -> None:
    """Send an event to Prefect's server, and return once the server has taken it.

    Args:
        event: its name.
        resource: labels of what it is about; ``prefect.resource.id`` is required.
        payload: what automations and readers may want to know.
        related: labels of what else is concerned, each with an id and ``prefect.resource.role``.

    Raises:
        ServerError: if there is no server, or it does not take the event.
    """
    content = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": dict(resource),
        "related": [dict(labels) for labels in related],
        "payload": dict(payload),
    }
    post("events", [content], what=f"the event {event}")


def post(path: str, content: Any, environment: Mapping[str, str] = os.environ, what: str = "") -> Any:
    """What a request to Prefect's API answers, None for an empty answer.

    Args:
        path: below the API's address.
        content: is sent as JSON.
        environment: names the server, and has the credentials.
        what: is sent, for the error; by default the path.

    Raises:
        ServerError: if there is no server, or it does not take the request.
    """
    address = server_address(environment)
    headers = {"Content-Type": "application/json", **_credentials(environment)}
    request = urllib.request.Request(f"{address}/{path}", json.dumps(content).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        refused = error.code in (401, 403)
        advice = "set PREFECT_API_AUTH_STRING to user:password" if refused else "a Prefect API's address ends with /api"
        problem = f"it answers {error}; {advice}"
    except ValueError as error:
        problem = f"it is no Prefect API, whose address ends with /api ({error})"
    except (OSError, HTTPException) as error:
        problem = f"it does not answer ({error}); start it, or correct PREFECT_API_URL"
    raise ServerError(f"the Prefect server {without_password(address)} has not taken {what or path}: {problem}")


def _credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """The header by which Prefect's own clients authenticate."""
    if key := environment.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    if user_and_password := environment.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(user_and_password.encode()).decode()}"}
    return {}
