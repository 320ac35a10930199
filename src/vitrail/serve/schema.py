"""The shapes of the HTTP interface, for `/openapi.json`: clients are generated from them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vitrail.serve.settings import MAX_IMAGES


class ErrorDetail(BaseModel):
    code: str = Field(description="what kind of error it is, for programs")
    message: str = Field(description="what is wrong, for people")
    hint: str = Field(description="what to do")


class Error(BaseModel):
    error: ErrorDetail


class PackedArray(BaseModel):
    """Numbers in 8 bits. A value is low + data / 255 * (high - low), with one low and high for each last axis."""

    shape: list[int]
    data: str = Field(description="one byte per value, row by row, in base64")
    low: str | None = Field(None, description="float32, little-endian, in base64; left out for bytes and booleans")
    high: str | None = Field(None, description="as `low`")


class Piece(BaseModel):
    text: str
    p: float = Field(description="probability")


class LayerAnswer(BaseModel):
    layer: int = Field(description="counted from 1")
    text: str
    answer: dict[str, Any]


class Maps(BaseModel):
    """What is explained beside a prediction. What a model does not have is left out, and told in `notes`."""

    frame: list[float] = Field(
        description="where the model's input lies in the image: left, top, right, bottom, as shares of its size"
    )
    grid: list[int] | None = Field(None, description="rows and columns of patches")
    patch: int | None = Field(None, description="side of a patch in pixels of what the model sees")
    prefix_tokens: int | None = None
    pool: Literal["token", "average"] | None = Field(
        None, description="what the answer is read from: the class token, or the mean of the patches"
    )
    pieces: list[Piece] | None = Field(None, description="of a caption: what the rows of `words` are")
    arrays: dict[str, PackedArray] = Field(
        description="over the patches: `relevance`, `rollout` and `words` (see docs/explain.md)"
    )
    notes: list[str]


class Explanation(Maps):
    """All of an explanation. `arrays` also has the attention between patches and more (see docs/explain.md)."""

    answer: dict[str, Any] = Field(description="as in a prediction")
    text: str = Field(description="the answer in one line")
    image: str = Field(description="the image as a data URL of a JPEG, at most 640 pixels long")
    outputs: list[str] | None = Field(None, description="what the rows of `relevance_outputs` are")
    image_beside: str | None = None
    frame_beside: list[float] | None = None
    grid_beside: list[int] | None = None
    attention_layers: list[int] | None = Field(
        None, description="what the rows of `attention` are: layers, counted from 1"
    )
    block: int | None = Field(
        None, description="side in patches of the blocks that stand for them in `attention` and `similarity`"
    )
    pca_shares: list[float] | None = Field(None, description="share of the variance of each colour of `pca`")
    filters: str | None = Field(None, description="what `filters` are")
    lens: list[LayerAnswer] | None = Field(None, description="the answer after each layer (the logit lens)")


class Explained(BaseModel):
    model: str = Field(description="the model that is explained")
    explanation: Explanation


class Label(BaseModel):
    label: str
    score: float


class Value(BaseModel):
    name: str
    value: float


class Caption(BaseModel):
    caption: str
    score: float = Field(description="log-probability by the search")
    tokens: list[Piece]


class RunLengths(BaseModel):
    """A mask as COCO writes it."""

    size: list[int]
    counts: str


class Segment(BaseModel):
    label: str
    share: float
    area: int = Field(description="pixels of the original")
    rle: RunLengths


class Prediction(BaseModel):
    """The answer of a task, with the fields of that task alone; it may have others than these."""

    model_config = ConfigDict(extra="allow")

    task: str | None = Field(None, description="left out beside `error`")
    error: str | None = Field(None, description="why this image has no answer, beside others that have")
    labels: list[Label] | None = None
    values: list[Value] | None = None
    caption: str | None = None
    captions: list[Caption] | None = None
    match: float | None = Field(None, description="how well a caption matches its image, where the model can tell")
    sure: bool | None = Field(None, description="whether that is enough to rely on")
    segments: list[Segment] | None = None
    embedding: list[float] | None = None
    explanation: Maps | None = Field(None, description="with `explain`")


class Predictions(BaseModel):
    model: str = Field(description="the model that answered")
    predictions: list[Prediction] = Field(
        description="one per image, in their order, as `vitrail predict --json` prints it without the path"
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
    class_names: list[str] | None = Field(description="null for more than 1,000 classes")
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


_MODEL = {"model": {"type": "string", "description": "name of the model; default: the first one"}}
_PREDICT = {
    **_MODEL,
    "top": {"type": "integer", "minimum": 1, "description": "number of classes to list, for models with classes"},
    "explain": {"type": "boolean", "description": "add maps of the answer to each prediction, of at most 16 images"},
}
_EXPLAIN = {
    **_MODEL,
    "class": {"type": "string", "description": "a class whose relevance is wanted beside those of the answer"},
}


def _body(fields: dict[str, Any], most: int, more: dict[str, str]) -> dict[str, Any]:
    """The body of a request with images; `more` are fields that are images too, with what they are."""

    def entry(image: dict[str, Any]) -> dict[str, Any]:
        images = {"type": "array", "minItems": 1, "maxItems": most, "items": image}
        beside = {name: {**image, "description": what} for name, what in more.items()}
        properties = {"images": images, **beside, **fields}
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


PREDICT = _body(_PREDICT, MAX_IMAGES, {})
EXPLAIN = _body(_EXPLAIN, 1, {"beside": "another image, whose patches are compared with those of the first"})
"""bodies of requests"""


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
