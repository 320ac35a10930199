"""The shapes of the HTTP interface, for `/openapi.json`: clients are generated from them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    code: str = Field(description="what kind of error it is, for programs")
    message: str = Field(description="what is wrong, for people")
    hint: str = Field(description="what to do")


class Error(BaseModel):
    error: ErrorDetail


class Predictions(BaseModel):
    model: str = Field(description="the model that answered")
    predictions: list[dict[str, Any]] = Field(
        description="one object per image, in their order, as `vitrail predict --json` prints it without the path: "
        "`task` and the answer of that task, or `error` for an image that cannot be read beside others that can; with "
        "`explain` also `explanation`"
    )


class Explanations(BaseModel):
    model: str = Field(description="the model that is explained")
    explanations: list[dict[str, Any]] = Field(
        description="one object per image: `prediction`, `grid` (rows and columns of patches), `rollout` (one number "
        "per patch), `attention_distance` (per layer and head), and `pieces` of an answer in pieces"
    )


class ModelCard(BaseModel):
    name: str
    task: str
    parameters: int | None = Field(description="number of weights; null for an export")
    image_size: list[int] = Field(description="height and width in pixels of what the model sees")
    resize: Literal["crop", "squash", "letterbox", "whole"] = Field(
        description="how an image becomes that size; `whole`: as `crop`, but nothing is cut off, so the size differs"
    )
    crop_fraction: float = Field(description="share of the resized image that a crop keeps, per side")
    patch: int | None = Field(description="side of a patch in pixels of what the model sees; null if it has none")
    channels: int
    classes: int = Field(description="number of classes; 0 for a task without")
    licence: str | None
    training_data: str | None
    engine: str = Field(description="what runs it")
    precision: str
    streams: bool = Field(description="whether `?stream=true` sends its answer word by word")


class Models(BaseModel):
    default: str = Field(description="the model of a request that names none")
    models: list[ModelCard]


class Health(BaseModel):
    status: str


_FIELDS: dict[str, Any] = {
    "model": {"type": "string", "description": "name of the model; default: the first one"},
    "top": {"type": "integer", "minimum": 1, "description": "number of classes to list, for models with classes"},
    "explain": {"type": "boolean", "description": "add an explanation to each prediction"},
}


def body(top: bool) -> dict[str, Any]:
    """The body of a request with images; with the fields `top` and `explain`, or without."""
    fields = _FIELDS if top else {"model": _FIELDS["model"]}

    def entry(images: dict[str, Any]) -> dict[str, Any]:
        properties = {"images": {"type": "array", "minItems": 1, "items": images}, **fields}
        return {"schema": {"type": "object", "required": ["images"], "properties": properties,
                           "additionalProperties": False}}  # fmt: skip

    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": entry({"type": "string", "format": "binary"}),
                "application/json": entry({"type": "string", "format": "byte", "description": "base64"}),
            },
        }
    }


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "a body that cannot be read, or that came too slowly"},
    401: {"model": Error, "description": "no valid API key"},
    404: {"model": Error, "description": "no model of this name"},
    413: {"model": Error, "description": "too many bytes, pixels or images"},
    415: {"model": Error, "description": "another content type, or no image"},
    422: {"model": Error, "description": "a damaged image, or a field that the model cannot take"},
    429: {"model": Error, "description": "too many requests; see Retry-After"},
    503: {"model": Error, "description": "the queue is full, or the server stops; see Retry-After"},
}
"""of the endpoints that take images"""
READING: dict[int | str, dict[str, Any]] = {401: ERRORS[401]}
