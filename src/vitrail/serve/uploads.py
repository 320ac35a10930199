"""The body of a request, in memory: uploads are never written to a disk.

Starlette's own parser of forms keeps files of more than a megabyte in temporary files.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vitrail.serve.errors import ApiError
from vitrail.serve.settings import MAX_IMAGES, Settings

FIELDS = ("model", "top", "explain")
"""fields beside `images` of `POST /v1/predict`"""
FILES = ("images", "beside")
"""fields that are images"""
MAX_FIELD = 1_000
"""bytes of a field that is not an image"""
MAX_HEAD = 8_000
"""bytes of the headers of one entry of a form"""
FORM_HINT = "send a form (multipart/form-data) with files `images`, or JSON with `images`, a list of base64 strings"
JSON_HINT = 'base64 without a prefix or line breaks, such as {"images": ["/9j/4AAQ..."]}'


@dataclass
class Upload:
    """What a request sends."""

    images: list[bytes] = field(default_factory=list)
    model: str | None = None
    top: int | None = None
    explain: bool = False
    of_class: str | None = None
    """the field `class`"""
    beside: bytes | None = None
    fields: tuple[str, ...] = FIELDS
    """those that this endpoint takes"""
    query: tuple[str, ...] = ("stream",)
    """parameters in the URL that this endpoint takes"""
    max_images: int = MAX_IMAGES
    """images that this endpoint takes"""

    def set(self, name: str, value: Any) -> None:
        """A field beside `images`, as JSON or as the text of a form has it."""
        if name not in self.fields:
            known = ", ".join(("images", *self.fields))
            raise ApiError(422, "unknown_field", f"there is no field {name[:100]!r} here", f"the fields are {known}")
        if name in ("model", "class"):
            if not isinstance(value, str):
                raise bad_field(name, "a string")
            if name == "model":
                self.model = value
            else:
                self.of_class = value
        elif name == "top":
            if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 10**9:
                raise bad_field("top", "a whole number of at least 1")
            self.top = value
        else:
            words = {"true": True, "1": True, "false": False, "0": False}
            if isinstance(value, str):
                value = words.get(value.lower())
            if not isinstance(value, bool):
                raise bad_field("explain", "true or false")
            self.explain = value

    def add(self, image: bytes, name: str = "images") -> None:
        """An image of the field `name`."""
        if name == "beside":
            if self.beside is not None:
                raise ApiError(413, "too_many_images", "a request has at most one image beside", "send one of them")
            self.beside = image
            return
        if len(self.images) == self.max_images:
            raise too_many_images(self.max_images)
        self.images.append(image)


def too_many_images(max_images: int, kind: str = "a request") -> ApiError:
    """413 for more images than `kind`, such as a request, may have."""
    images = "one image" if max_images == 1 else f"{max_images} images"
    return ApiError(413, "too_many_images", f"{kind} has at most {images}", "send several requests")


def bad_field(name: str, kind: str) -> ApiError:
    """422 for a field whose value is not of this kind, such as "a string"."""
    hint = f"send {kind}" if name == "images" else f"send {kind}, or leave {name} out"
    return ApiError(422, "bad_field", f"the field {name} must be {kind}", hint)


async def read_upload(request: Request, settings: Settings, upload: Upload) -> Upload:
    """Fill an empty upload with the images and the fields of a request. Raises ApiError."""
    for name in request.query_params:
        if name not in upload.query:  # a field there would be left out, and the answer another than was wanted
            known = ", ".join(("images", *upload.fields))
            raise ApiError(
                422,
                "bad_query",
                f"the URL has a parameter {name[:100]!r} that is not known here",
                f"send the fields {known} in the form or the JSON body",
            )
    try:
        async with asyncio.timeout(settings.timeout):
            upload = await _read(request, settings.max_upload, upload)
    except TimeoutError:
        raise ApiError(
            400,
            "upload_too_slow",
            f"the upload was not complete after {settings.timeout:g} seconds",
            "send smaller images, or fewer of them at once",
            {"Connection": "close"},
        ) from None
    if not upload.images:
        raise ApiError(422, "no_images", "the request has no images", FORM_HINT)
    return upload


async def _read(request: Request, limit: int, upload: Upload) -> Upload:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind == b"multipart/form-data":
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise ApiError(400, "bad_form", "the form names no boundary", "let your HTTP client write the content type")
        form = Form(boundary, upload)
        async for chunk in _chunks(request, limit):
            form.write(chunk)
        return form.finish()
    if kind == b"application/json":
        body = bytearray()
        async for chunk in _chunks(request, limit):
            body += chunk
        # Megabytes of base64 take a while: not in the event loop.
        return await asyncio.get_running_loop().run_in_executor(None, from_json, body, upload)
    shown = kind.decode("latin-1")[:100] or "none"
    raise ApiError(415, "unsupported_media_type", f"the content type is {shown}", FORM_HINT)


async def _chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        yield chunk


def too_large(limit: int) -> ApiError:
    """413 for a request of more bytes than the limit."""
    return ApiError(
        413,
        "too_large",
        f"the request has more than {limit:,} bytes, the limit of this server",
        "send smaller images, or fewer of them at once",
    )


class Form:
    """multipart/form-data, chunk by chunk. What a client calls its files is not used for anything."""

    def __init__(self, boundary: bytes, upload: Upload) -> None:
        self.upload, self.complete = upload, False
        self._begin()
        try:
            self.parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._named,
                    "on_part_data": self._more,
                    "on_part_end": self._end,
                    "on_end": self._finished,
                },
            )
        except FormParserError as error:
            raise self._bad(str(error)) from None

    def write(self, chunk: bytes) -> None:
        """Parse the next bytes of the body. Raises ApiError for a form that cannot be read or a refused field."""
        try:
            self.parser.write(chunk)
        except FormParserError as error:
            raise self._bad(str(error)) from None

    def finish(self) -> Upload:
        """The upload, after the last byte. Raises ApiError for a form that ends too early."""
        if not self.complete:
            raise self._bad("it ends before its last boundary")
        return self.upload

    @staticmethod
    def _bad(reason: str) -> ApiError:
        return ApiError(400, "bad_form", f"the form cannot be read: {reason[:200]}", FORM_HINT)

    def _begin(self) -> None:
        self.name, self.data, self.names, self.value = "", bytearray(), bytearray(), bytearray()
        self.size = 0

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self.names += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self.value += data[start:end]

    def _count(self, size: int) -> None:
        self.size += size
        if self.size > MAX_HEAD:
            raise self._bad("the headers of an entry are too long")

    def _header_end(self) -> None:
        if self.names.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self.value))
            self.name = options.get(b"name", b"").decode("utf-8", "replace")
        self.names, self.value = bytearray(), bytearray()

    def _named(self) -> None:
        if not self.name:
            raise self._bad("an entry has no name")
        if self.name != "images" and self.name not in self.upload.fields:
            self.upload.set(self.name, "")  # refuses it, before its content comes

    def _more(self, data: bytes, start: int, end: int) -> None:
        if self.name not in FILES and len(self.data) + end - start > MAX_FIELD:
            raise bad_field(self.name, f"a string of at most {MAX_FIELD:,} bytes")
        self.data += data[start:end]

    def _end(self) -> None:
        if self.name in FILES:
            self.upload.add(bytes(self.data), self.name)
        else:
            self.upload.set(self.name, self.data.decode("utf-8", "replace"))
        self.data = bytearray()

    def _finished(self) -> None:
        self.complete = True


def from_json(body: bytes | bytearray, upload: Upload) -> Upload:
    """Fill the upload from a body of JSON."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "bad_json", "the body is not JSON", f"send {JSON_HINT}") from None
    if not isinstance(found, dict):
        raise ApiError(422, "bad_json", "the body is not a JSON object", f"send {JSON_HINT}")
    images = found.pop("images", None)
    if images is None:
        images = []
    if not isinstance(images, list):
        raise bad_field("images", "a list of strings")
    beside = found.pop("beside", None) if "beside" in upload.fields else None
    for name, value in found.items():
        if value is not None or name not in upload.fields:
            upload.set(name, value)
    for number, text in enumerate(images, 1):
        upload.add(from_base64(text, "images", f"image {number}"))
    if beside is not None:
        upload.add(from_base64(beside, "beside", "beside"), "beside")
    return upload


def from_base64(text: object, field: str, name: str) -> bytes:
    """The bytes of an image in a JSON body. Raises ApiError, which calls the image `name`."""
    if not isinstance(text, str):
        raise bad_field(field, "a list of strings" if field == "images" else "a string")
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        hint = f"send {JSON_HINT}; URLs are not fetched"
        raise ApiError(422, "bad_base64", f"{name} is not base64", hint) from None
