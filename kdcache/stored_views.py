"""Rendered views that lie in the cache: how a view is encoded and decoded, and what it weighs. Used by both stages.

With `jpeg95` the view *is* what the stored JPEG decodes to: the teacher sees that, the pixel digest is of that, and the codec is
part of the view plan. `png` and `raw` are without loss, so their views are the rendered ones. Encoding happens once, at
extraction; whoever reads decodes, and compares digests at the rate that it checks views.

Why no chroma subsampling and no options beyond: decoders of the libjpeg family agree to the bit on a baseline JPEG that needs no
upsampling, and Pillow's `optimize` fails on noise ("Suspension not allowed", Pillow 13.0) for 5 % fewer bytes.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from .errors import CorruptError
from .images import DECODER_ERRORS
from .plan import StoredCodec, ViewPlan

View = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 (S, S, 3)"""

_FORMATS = {"jpeg95": "JPEG", "png": "PNG"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "jpeg95": {"quality": 95, "subsampling": 0, "optimize": False, "progressive": False},
    "png": {"compress_level": 1},  # 6, Pillow's default, saves 7 % at 2.6 × the time, measured on one view
}
_HEADER_BYTES = {"jpeg95": 623, "png": 60, "raw": 0}
_BYTES_PER_PIXEL = {"jpeg95": (27_800 - 623) / 224**2, "png": 2.0, "raw": 3.0}
"""Of photographs cropped and resized, 27.8 kB a JPEG of 224 pixels (benchmarks/views.py prints its own); raw is exact."""


def estimated_bytes(codec: StoredCodec, size: int) -> float:
    """What a view of `size` pixels a side weighs, by its area; an estimate."""
    return _HEADER_BYTES[codec] + size * size * _BYTES_PER_PIXEL[codec]


def encode_view(codec: StoredCodec, view: View) -> bytes:
    """The bytes that are stored for a view."""
    if codec == "raw":
        return view.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(view).save(buffer, _FORMATS[codec], **_OPTIONS[codec])
    return buffer.getvalue()


def decode_view(codec: StoredCodec, data: bytes, size: int) -> View:
    """uint8 (size, size, 3), writable. Raises CorruptError for bytes that are no such image; the header is checked before decoding."""
    if codec == "raw":
        if len(data) != size * size * 3:
            raise CorruptError(f"a raw view has {len(data)} bytes, expected {size * size * 3}")
        return np.frombuffer(data, np.uint8).reshape(size, size, 3).copy()
    try:
        image = Image.open(io.BytesIO(data), formats=(_FORMATS[codec],))
        if (image.mode, image.size) != ("RGB", (size, size)):
            raise CorruptError(f"the stored image is {image.mode} of {image.width}x{image.height} pixels, expected RGB of {size}x{size}")
        return np.array(image, dtype=np.uint8)
    except (*DECODER_ERRORS, Image.DecompressionBombError) as error:  # what Pillow's decoders raise on damage
        raise CorruptError(f"the stored {_FORMATS[codec]} can't be decoded: {error}") from error


def as_stored(plan: ViewPlan, view: View) -> tuple[View, bytes]:
    """What the teacher sees of a rendered view, and the bytes to store; with nothing to store, the view itself and no bytes."""
    codec = plan.stored_views
    if codec is None or codec == "raw":
        return view, b""
    data = encode_view(codec, view)
    return decode_view(codec, data, plan.size), data
