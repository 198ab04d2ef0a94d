"""The HTTP interface of a generator: OpenAI's image endpoint, an endpoint for each task, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import nullcontext
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from cm3leon.generation.checks import BadInputError, PromptTooLongError
from cm3leon.generation.task_names import FORMER_NAMES
from cm3leon.serving import responses, schemas
from cm3leon.serving.batching import State, Worker
from cm3leon.serving.calls import Call
from cm3leon.serving.errors import CLIENT_GONE, ApiError, from_validation
from cm3leon.serving.guard import Guard
from cm3leon.serving.requests import REQUESTS

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
IMAGES_ROUTE = "/v1/images/generations"
DECODED_TOGETHER = 2
"""Requests whose images are decoded at the same time: one image takes up to 150 MB meanwhile."""
DEPRECATED_SINCE = 1795737600
"""When routes and fields of earlier versions were deprecated (2026-11-27), as the header ``Deprecation`` gives it (RFC 9745)."""


def task_route(task: str) -> str:
    """The path of a task's endpoint."""
    return f"/v1/tasks/{task}"


async def disconnected(request: Request) -> None:
    """Return once the client has disconnected; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answer(worker: Worker, call: Call, request: Request) -> Any:
    """The call's result; a call whose client disconnects before its turn is withdrawn.

    Raises:
        ApiError: if it is refused, cannot be answered, or its client disconnected.
    """
    future = worker.submit(call)
    done, gone = asyncio.wrap_future(future), asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ApiError(CLIENT_GONE, "the client disconnected", code="client_gone")
        return done.result()
    except (BadInputError, PromptTooLongError) as error:
        code = "prompt_too_long" if isinstance(error, PromptTooLongError) else "bad_input"
        raise ApiError(400, str(error), code=code) from None
    finally:
        gone.cancel()
        done.cancel()
        worker.withdraw(future)


def create_app(worker: Worker, hosts: Collection[str] | None = LOOPBACK) -> Guard:
    """The application.

    Args:
        hosts: host names that requests may address; None: any.
    """
    app = FastAPI(title="cm3leon", version=version("cm3leon"), docs_url=None, redoc_url=None)
    name, started, decoding = worker.name, int(time.time()), asyncio.Semaphore(DECODED_TOGETHER)

    def task_endpoint(kind: type[schemas.TaskRequest], successor: str | None = None) -> Callable[..., Awaitable[Response]]:
        """An endpoint for one kind of request; ``successor`` is the path that replaces it if it is deprecated."""

        has_images = not kind.model_fields.keys().isdisjoint({"image", "document"})

        async def endpoint(body: Any, request: Request) -> Response:
            if body.model not in (None, name):
                raise ApiError(404, f"model: this server has {name!r} (found {body.model!r})", param="model", code="model_not_found")
            with worker.arriving():
                async with decoding if has_images else nullcontext():
                    call = await run_in_threadpool(body.call, worker.ready())
            result = await answer(worker, call, request)
            headers = {}
            if successor or body.is_deprecated:
                headers["Deprecation"] = f"@{DEPRECATED_SINCE}"
                headers["Link"] = f'<{successor or task_route(call.task)}>; rel="successor-version"'
            return JSONResponse(await run_in_threadpool(responses.body, result), headers=headers)

        endpoint.__annotations__["body"] = kind  # FastAPI reads the body's type here
        endpoint.__doc__ = kind.__doc__
        return endpoint

    routes = {IMAGES_ROUTE: "text_to_image"} | {task_route(task): task for task in REQUESTS}
    for path, task in routes.items():
        app.add_api_route(path, task_endpoint(REQUESTS[task]), methods=["POST"], name=task)
    former_routes = {task_route(old): task for old, task in FORMER_NAMES.items()}
    for path, task in former_routes.items():
        endpoint = task_endpoint(REQUESTS[task], successor=task_route(task))
        app.add_api_route(path, endpoint, methods=["POST"], name=path, include_in_schema=False)

    @app.get("/v1/models")
    def models() -> Any:
        """The served model; ``cm3leon`` describes what it can do, or is null while it is loaded."""
        found = responses.describe(worker.generator) if worker.generator is not None else None
        model = {"id": name, "object": "model", "created": started, "owned_by": "cm3leon", "version": worker.version, "cm3leon": found}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    def health() -> Response:
        """200 if requests are answered."""
        status = 200 if worker.state is State.READY else 503
        return JSONResponse({"status": worker.state, "model": name, "version": worker.version, "queue_length": worker.queue_length}, status)

    @app.get("/metrics")
    def metrics() -> Response:
        """In Prometheus's text format."""
        return Response(worker.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    add_error_handlers(app)
    return Guard(app, worker.metrics, routes | former_routes, schemas.MAX_BODY, schemas.MAX_HELD, hosts)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = ApiError(error.status_code, message, code=HTTPStatus(error.status_code).name.lower()).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed to answer; the reason is in its log", code="internal_error").response()
