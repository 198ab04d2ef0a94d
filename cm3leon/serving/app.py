"""The HTTP interface of a generator: OpenAI's image endpoint, one endpoint for each other task, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
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

from cm3leon.generation.generator import BadInputError, PromptTooLongError
from cm3leon.serving import requests, responses, schemas
from cm3leon.serving.batching import Call, State, Worker
from cm3leon.serving.errors import CLIENT_GONE, ApiError, from_validation
from cm3leon.serving.guard import Guard

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
IMAGES = "/v1/images/generations"


async def disconnected(request: Request) -> None:
    """Return once the client has left; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answer(worker: Worker, call: Call, request: Request) -> Any:
    """The call's result; a call whose client leaves before its turn is withdrawn.

    Raises:
        ApiError: if it is refused, cannot be answered, or its client left.
    """
    future = worker.submit(call)
    done, gone = asyncio.wrap_future(future), asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ApiError(CLIENT_GONE, "the client left", code="client_gone")
        return done.result()
    except (BadInputError, PromptTooLongError) as error:
        code = "prompt_too_long" if isinstance(error, PromptTooLongError) else "bad_input"
        raise ApiError(400, str(error), code=code) from None
    finally:
        gone.cancel()
        done.cancel()
        worker.withdraw(future)


def create_app(worker: Worker, name: str, hosts: Collection[str] | None = LOOPBACK) -> Guard:
    """The application.

    Args:
        name: the model's id.
        hosts: names under which the server may be asked for; None: any.
    """
    app = FastAPI(title="cm3leon", version=version("cm3leon"), docs_url=None, redoc_url=None)
    started = int(time.time())

    def task_endpoint(kind: type[schemas.TaskRequest]) -> Callable[..., Awaitable[Response]]:
        async def endpoint(body: Any, request: Request) -> Response:
            if body.model not in (None, name):
                raise ApiError(404, f"model: this server has {name!r} (found {body.model!r})", param="model", code="model_not_found")
            call = await run_in_threadpool(body.call, worker.ready())
            result = await answer(worker, call, request)
            return JSONResponse(await run_in_threadpool(responses.body, result))

        endpoint.__annotations__["body"] = kind
        endpoint.__doc__ = kind.__doc__
        return endpoint

    tasks = {IMAGES: requests.TextToImage} | {f"/v1/tasks/{kind.task}": kind for kind in requests.TASKS}
    for path, kind in tasks.items():
        app.add_api_route(path, task_endpoint(kind), methods=["POST"], name=kind.task)

    @app.get("/v1/models")
    def models() -> Any:
        """The served model; ``cm3leon`` says what it can do, once it is loaded."""
        found = responses.describe(worker.generator) if worker.generator is not None else None
        return {"object": "list", "data": [{"id": name, "object": "model", "created": started, "owned_by": "cm3leon", "cm3leon": found}]}

    @app.get("/health")
    def health() -> Response:
        """200 if requests are answered."""
        status = 200 if worker.state is State.READY else 503
        return JSONResponse({"status": worker.state, "model": name, "queue_length": worker.queue_length}, status)

    @app.get("/metrics")
    def metrics() -> Response:
        """In Prometheus's text format."""
        return Response(worker.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    add_error_handlers(app)
    return Guard(app, worker.metrics, {path: kind.task for path, kind in tasks.items()}, schemas.MAX_BODY, hosts)


def add_error_handlers(app: FastAPI) -> None:
    """Every error in the one shape."""

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
