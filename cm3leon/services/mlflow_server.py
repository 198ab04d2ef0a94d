"""The MLflow server of ``cm3leon ui``, through which clients on other hosts read and write artifacts too.

    python -m cm3leon.services.mlflow_server ARTIFACTS PORT

The store is that of :func:`cm3leon.tracking.store.tracking_uri`: the command line, which every user of the host can read, has no password.

Stages record without a server, in SQLite with artifacts in ``mlruns``, whose addresses in the store are ``file:`` URIs. In this server's
answers they are ``mlflow-artifacts:`` URIs, which MLflow's clients fetch from the server; in requests it reads them the other way round. So
the same runs and models can be used with and without it, and an older store needs no change.
"""

from __future__ import annotations

import base64
import hmac
import os
import sys

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cm3leon.tracking import store

HOST = "127.0.0.1"
CREDENTIALS_ENV = "CM3LEON_MLFLOW_CREDENTIALS"
"""``USER:PASSWORD`` that clients have to send; unset: none."""
SERVED = b"mlflow-artifacts:/"
ARTIFACTS = ("/mlflow-artifacts/", "get-artifact", "/artifacts/files")
"""In the paths of requests for the contents of artifacts, which are passed on unchanged."""


class BasicAuth:
    """An ASGI application that wraps another and asks for one user's name and password (RFC 7617); ``/health`` is open.

    Args:
        credentials: ``USER:PASSWORD``.
    """

    def __init__(self, app: ASGIApp, credentials: str) -> None:
        self.app = app
        self.expected = b"Basic " + base64.b64encode(credentials.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] in ("http", "websocket") and scope["path"] != "/health":
            given = Headers(scope=scope).get("authorization", "").encode()
            if not hmac.compare_digest(given, self.expected):
                challenge = {"WWW-Authenticate": 'Basic realm="MLflow", charset="UTF-8"'}
                await PlainTextResponse("user and password are needed", 401, challenge)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class ServedArtifacts:
    """An ASGI application that wraps MLflow's.

    Args:
        root: ``file:`` URI of the directory of artifacts.
    """

    def __init__(self, app: ASGIApp, root: str) -> None:
        self.app = app
        self.root = root.rstrip("/").encode() + b"/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or any(part in scope["path"] for part in ARTIFACTS):
            await self.app(scope, receive, send)
            return
        body = self.to_files(await read(receive))
        headers = MutableHeaders(scope=scope)
        if "content-length" in headers:
            headers["content-length"] = str(len(body))
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_on() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_on, self.sender(send))

    def to_files(self, body: bytes) -> bytes:
        """A request's body with the artifacts' addresses in the store."""
        return body.replace(b'"' + SERVED, b'"' + self.root)

    def to_served(self, body: bytes) -> bytes:
        """A response's body with the artifacts' addresses on this server."""
        return body.replace(self.root, SERVED).replace(b'"' + self.root[:-1] + b'"', b'"' + SERVED + b'"')

    def sender(self, send: Send) -> Send:
        """``send`` for responses, of which those in JSON are collected and changed."""
        start: Message | None = None
        chunks: list[bytes] = []

        async def send_on(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                if "json" in Headers(raw=message["headers"]).get("content-type", ""):
                    start = message
                    return
            elif start is not None:
                chunks.append(message.get("body", b""))
                if message.get("more_body", False):
                    return
                body = self.to_served(b"".join(chunks))
                MutableHeaders(raw=start["headers"])["content-length"] = str(len(body))
                await send(start)
                message = {"type": "http.response.body", "body": body}
            await send(message)

        return send_on


async def read(receive: Receive) -> bytes:
    """The body of a request."""
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def main(root: str, port: int) -> None:
    """Serve the store, which must be prepared, until a signal.

    Args:
        root: ``file:`` URI of the directory of artifacts.
    """
    import uvicorn
    from mlflow.server import constants

    store.use_settings()
    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = store.tracking_uri()
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = root
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    from mlflow.server.fastapi_app import app

    served: ASGIApp = ServedArtifacts(app, root)
    if credentials := os.environ.pop(CREDENTIALS_ENV, ""):
        served = BasicAuth(served, credentials)
    uvicorn.run(served, host=HOST, port=port)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
