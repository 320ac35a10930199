"""Arrays and images of an explanation as plain data for JSON."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]


def packed(array: Array) -> dict[str, Any]:
    """An array as `shape` and base64: `data`, one byte per value, and `low` and `high`, float32 for each last axis.

    A value is low + data / 255 * (high - low), so that each map keeps its own range. Bytes and booleans are unchanged,
    without `low` and `high`.
    """
    if array.dtype in (np.uint8, np.bool_):
        return {"shape": list(array.shape), "data": _base64(array.astype(np.uint8))}
    values = array.astype(np.float32)
    low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
    span = np.where(high > low, high - low, 1)
    data = np.round((values - low) / span * 255).astype(np.uint8)
    return {"shape": list(array.shape), "data": _base64(data), "low": _base64(low), "high": _base64(high)}


def _base64(array: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def jpeg(pixels: Array) -> bytes:
    """Pixels [H, W, 3] as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def jpeg_url(pixels: Array) -> str:
    """The same as a data URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(pixels)).decode()}"
