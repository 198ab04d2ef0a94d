"""Errors of the HTTP interface, in the shape of OpenAI's: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.responses import JSONResponse

CLIENT_GONE = 499
"""Status that is counted, and sent to nobody, if the client disconnected before its answer."""


class ApiError(Exception):
    """A request is refused.

    ``message`` says what is wrong and what to do, ``param`` names the field, ``code`` is for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def type(self) -> str:
        """OpenAI's type of the error, by status."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def response(self) -> JSONResponse:
        """The response that the client gets."""
        from starlette.responses import JSONResponse  # a registered model uses these errors without a server installed

        body = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else None
        return JSONResponse({"error": body}, self.status, headers)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors about a request's body, with the value found if it is short."""
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", first["msg"])
        return ApiError(400, f"the body is not valid JSON: {detail} at character {param}", code="json_invalid")
    if not param:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json", code="body_invalid")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: unknown field; remove it (/openapi.json lists the known ones)", param=param, code="unknown_field")
    message = f"{param}: {first['msg'].removeprefix('Value error, ')}"
    if first["type"] != "missing" and len(found := repr(first.get("input"))) <= 80:
        message += f" (found {found})"
    return ApiError(400, message, param=param, code=first["type"])
