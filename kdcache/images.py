"""From the bytes of an image member to a uint8 RGB image, by one rule for every stage and machine.

The rule, as the field's loaders have it: the file's own orientation (EXIF orientation is ignored, as timm and torchvision
do), alpha dropped, palettes expanded, grey repeated, CMYK converted by Pillow, 16-bit grey reduced to its high byte. No
draft mode and no fast decoder flags: both change pixels.

The view plan names the decoder. Another than Pillow decodes plain JPEGs only, which their first bytes tell, and of these only the sound ones:
what it refuses or warns of is Pillow's to judge. So every decoder skips the same images for the same reasons.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from importlib import import_module
from typing import TypeAlias, overload

import numpy as np
from PIL import Image, UnidentifiedImageError

from .augment import Pixels
from .errors import UsageError
from .plan import DecoderName

MAX_PIXELS = 89_478_485
"""A larger image is skipped as a decompression bomb: Pillow's own limit, 256 MiB of RGB."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

Decoded: TypeAlias = Image.Image | Pixels
"""An RGB image as its decoder gives it: Pillow's, or uint8 (H, W, 3). Converting costs an eighth of decoding."""

_FORMATS = ("JPEG", "PNG", "WEBP")
_FRAMES = (0xC0, 0xC1, 0xC2)
"""JPEG's markers of a baseline, extended and progressive frame with Huffman codes (ITU-T T.81, table B.1)."""
_BEFORE_FRAME = frozenset((*range(0xE0, 0xF0), 0xFE, 0xDB, 0xC4, 0xDD))
"""Of what may stand before one: application data, comments, quantisation and Huffman tables, restart interval."""
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


@overload
def decode_image(data: bytes) -> Image.Image: ...


@overload
def decode_image(data: bytes, decoder: DecoderName) -> Decoded: ...


def decode_image(data: bytes, decoder: DecoderName = "pillow") -> Decoded:
    """Decode to an RGB image. decoder: a view plan's.

    Raises UnreadableImageError with a reason that is the same on every machine and with every decoder, UsageError for a decoder that is not installed.
    """
    if decoder == "simplejpeg" and is_plain_jpeg(data):
        pixels = _decode_simplejpeg(data)
        if pixels is not None:
            return pixels
    return _decode_pillow(data)


def is_plain_jpeg(data: bytes) -> bool:
    """Whether a decoder other than Pillow may try: a JPEG whose first frame is of Huffman-coded DCT, 8 bits, grey or three components, and no bomb."""
    if data[:2] != b"\xff\xd8":
        return False
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
            return bits == 8 and components in (1, 3) and 0 < width * height <= MAX_PIXELS
        if marker not in _BEFORE_FRAME:
            return False
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def require_decoder(decoder: DecoderName) -> None:
    """Raise UsageError, with the command that installs it, if a plan's decoder is not there. Called before work that will render."""
    if decoder == "pillow":
        return
    try:
        import_module(decoder)
    except ImportError as error:
        raise UsageError(
            f"the view plan's decoder {decoder} can't be loaded ({error}); another decoder may give other pixels: pip install 'kdcache[fast]'"
        ) from error


def size_of(image: Decoded) -> tuple[int, int]:
    """Width and height, pixels."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def as_pillow(image: Decoded) -> Image.Image:
    """The image for Pillow's ops; of an array a copy."""
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _decode_simplejpeg(data: bytes) -> Pixels | None:
    """uint8 (H, W, 3), or None for a JPEG that libjpeg-turbo refuses or warns of. Accurate transform and smooth upsampling, as Pillow's."""
    require_decoder("simplejpeg")
    import simplejpeg

    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None
    return pixels


def _decode_pillow(data: bytes) -> Image.Image:
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
