"""Errors over HTTP: `{"error": {"code", "message", "hint"}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi.responses import Response


class ApiError(Exception):
    """An answer that is an error: what is wrong, and what to do."""

    def __init__(
        self, status: int, code: str, message: str, hint: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.hint, self.headers = status, code, message, hint, dict(headers or {})

    def body(self) -> dict[str, Any]:
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
