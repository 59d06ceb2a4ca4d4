"""Pixels to `data:` addresses, all pictures of a page within a budget of bytes.

Small pictures and maps stay exact (PNG); photographs become JPEGs, all of one quality and size, the best that the budget allows.

Legend: H W rows and columns.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

_LADDER = ((88, 512), (82, 448), (75, 384), (68, 320), (60, 256), (50, 224), (40, 192), (30, 160))
"""JPEG quality and longest side in pixels, tried in this order."""
_EXACT_PIXELS = 96 * 96
"""A picture of at most so many is stored exactly and shown with its pixels to be seen."""

_COLOURS = ((0.0, (13, 8, 64)), (0.25, (84, 15, 109)), (0.5, (187, 55, 84)), (0.75, (249, 142, 9)), (1.0, (252, 255, 180)))
"""Dark to light without a turn in lightness, so that it can be read without colour."""


@dataclass
class Picture:
    """A picture of the page. `uri` is filled in by `encode_pictures`."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]] = field(repr=False)
    """uint8 (H, W, 3)"""
    uri: str = ""

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def is_small(self) -> bool:
        """Whether its pixels are to be seen."""
        return self.width * self.height <= _EXACT_PIXELS


def encode_pictures(pictures: Iterable[Picture], budget_bytes: float) -> None:
    """Give every picture its address. Maps come first, since they are small; what they leave is for photographs, but at least half."""
    photographs: list[Picture] = []
    exact_bytes = 0
    for picture in pictures:
        if picture.is_small:
            picture.uri = png_uri(picture.pixels)
            exact_bytes += len(picture.uri)
        else:
            photographs.append(picture)
    left = max(budget_bytes - exact_bytes, budget_bytes / 2)
    for quality, side in _LADDER:
        encoded: list[str] = []
        total = 0
        for picture in photographs:
            encoded.append(_jpeg_uri(picture.pixels, quality, side))
            total += len(encoded[-1])
            if total > left and (quality, side) != _LADDER[-1]:
                break
        else:
            break
    for picture, uri in zip(photographs, encoded, strict=True):
        picture.uri = uri


def thumbnail(image: Image.Image, side: int) -> Picture:
    """An image at most `side` pixels on its longer side."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return Picture(np.asarray(image, dtype=np.uint8))


def png_uri(pixels_HW3: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """Without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "PNG", optimize=True)
    return _uri("png", buffer)


def _jpeg_uri(pixels_HW3: np.ndarray[Any, np.dtype[np.uint8]], quality: int, side: int) -> str:
    image = Image.fromarray(pixels_HW3)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return _uri("jpeg", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def heat(values_HW: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Numbers from 0 to 1 as colours, uint8 (H, W, 3)."""
    places, colours = [place for place, _ in _COLOURS], np.array([colour for _, colour in _COLOURS], np.float64)
    channels = [np.interp(values_HW, places, colours[:, channel]) for channel in range(3)]
    result: np.ndarray[Any, np.dtype[np.uint8]] = np.round(np.stack(channels, axis=-1)).astype(np.uint8)
    return result
