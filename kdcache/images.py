"""From the bytes of an image member to a uint8 RGB image, by one rule for every stage and machine.

The rule, as the field's loaders have it: the file's own orientation (EXIF orientation is ignored, as timm and torchvision
do), alpha dropped, palettes expanded, grey repeated, CMYK converted by Pillow, 16-bit grey reduced to its high byte. No
draft mode and no fast decoder flags: both change pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""A larger image is skipped as a decompression bomb: Pillow's own limit, 256 MiB of RGB."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_FORMATS = ("JPEG", "PNG", "WEBP")
DECODER_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error)
"""What Pillow's decoders raise on damage."""


class UnreadableImageError(ValueError):
    """An image that is skipped.

    reason: what the record keeps, the same with every decoder version. detail: what the decoder said, for people.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def decode_image(data: bytes) -> Image.Image:
    """Decode to an RGB image. Raises UnreadableImageError with a reason that is the same on every machine."""
    if not data:
        raise UnreadableImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs have our own limit; damaged EXIF data is not looked at
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError("decompression bomb", f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} are decoded")
            image.load()
    except Image.DecompressionBombError as error:
        raise UnreadableImageError("decompression bomb", f"more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not a JPEG, PNG or WebP image") from error
    except DECODER_ERRORS as error:
        if isinstance(error, UnreadableImageError):
            raise
        raise UnreadableImageError("damaged image", f"{type(error).__name__}: {error}"[:200]) from error
    if image.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip instead of scale
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
