"""Errors over HTTP: `{"error": {"code", "message", "hint"}}`."""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vitrail.errors import UserError

log = logging.getLogger("vitrail")


class ApiError(Exception):
    """An answer that is an error: what is wrong, and what to do."""

    def __init__(
        self, status: int, code: str, message: str, hint: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint, self.headers = status, code, message, hint, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Plain data, as every error is sent."""
        return {"error": {"code": self.code, "message": self.message, "hint": self.hint}}

    def response(self) -> Response:
        return as_json(self.body(), self.status, self.headers)


def busy(message: str, seconds: float, code: str = "busy") -> ApiError:
    """503, with the time after which to try again."""
    after = str(max(1, min(60, round(seconds))))
    return ApiError(503, code, message, f"try again after {after} seconds", {"Retry-After": after})


def as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response in ASCII: texts of clients and of models may hold what UTF-8 cannot express."""
    return Response(json.dumps(value, allow_nan=False), status, dict(headers or {}), "application/json")


def as_compressed_json(value: object, accepted: str) -> Response:
    """The same for megabytes, in a thread that may be kept busy: compressed if `Accept-Encoding` lists gzip."""
    if not re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?(?![.\d]))", accepted, re.IGNORECASE):
        return as_json(value, headers={"Vary": "Accept-Encoding"})
    body = gzip.compress(json.dumps(value, allow_nan=False).encode(), compresslevel=1, mtime=0)
    return Response(body, 200, {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}, "application/json")


def as_api(error: Exception) -> ApiError:
    """Any error as one of the interface."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):  # of the task, such as an option that it lacks
        return ApiError(422, "refused", str(error), "change the request, or choose another model (GET /v1/models)")
    if isinstance(error, RequestValidationError):
        where = error.errors()[0]
        name = ".".join(map(str, where.get("loc", ())[1:]))
        return ApiError(422, "bad_query", f"{name}: {where.get('msg', 'not valid')}", "see /docs for the parameters")
    if isinstance(error, ClientDisconnect):
        return ApiError(400, "disconnected", "the client has disconnected", "send the whole request")
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return ApiError(404, "not_found", "there is nothing at this path", "see /docs for the endpoints")
        hint = "see /docs for the endpoints and their methods"
        code = "method_not_allowed" if error.status_code == 405 else "refused"
        return ApiError(error.status_code, code, str(error.detail), hint, error.headers)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return busy("there is not enough memory for this request now", 10, "out_of_memory")
    log.error(f"internal error: {type(error).__name__}: {error}")
    return ApiError(500, "internal", "the server failed to answer", "report this with the line in the server's log")
