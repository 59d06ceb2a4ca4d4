"""What policies do to the pixels of a view: image ops, erasing, mixing. Called by `views.render`, with all that was drawn given.

Ops are Pillow's, as timm 1.0.31 calls them (data/auto_augment.py); a test compares the two byte for byte. Their numbers and
the units of their magnitudes are part of the format (FORMAT.md §3). Noise and mixing are integer arithmetic of our own.

Legend: H W height and width of a box or view, pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from .errors import CorruptError

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

FILL = (124, 116, 104)
"""What rotating, shearing and translating leave uncovered: ImageNet's mean colour, 255 · (.485, .456, .406) rounded, as timm has it."""
Q16 = 1 << 16
SOLARIZE_ADD_BELOW = 128
"""SolarizeAdd brightens values below this."""

AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD = range(1, 8)
COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(8, 16)
GREYSCALE, GAUSSIAN_BLUR = 16, 17


@dataclass(frozen=True)
class Op:
    """One image op: how it is done, and which magnitudes (in 1/65536) it may have."""

    name: str
    """For people."""
    apply: Callable[[Image.Image, float, Image.Resampling], Image.Image]
    """(image, magnitude, filter) → image of the same size."""
    lowest: float = 0.0
    highest: float = 0.0
    is_whole: bool = False
    """Whether the magnitude is a whole number: a threshold, or bits."""

    def allows(self, magnitude_q16: int) -> bool:
        """Whether a draw can give this magnitude."""
        inside = int(self.lowest * Q16) <= magnitude_q16 <= int(self.highest * Q16)
        return inside and not (self.is_whole and magnitude_q16 % Q16)


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=FILL)


def _posterize(image: Image.Image, bits: float, _resample: Image.Resampling) -> Image.Image:
    """ImageOps.posterize, of which newer versions refuse 0 bits: black."""
    mask = 0xFF << (8 - int(bits)) & 0xFF
    return image.point([value & mask for value in range(256)] * 3)


def _solarize_add(image: Image.Image, add: float, _resample: Image.Resampling) -> Image.Image:
    table = [min(255, value + int(add)) if value < SOLARIZE_ADD_BELOW else value for value in range(256)]
    return image.point(table * 3)


OPS: Mapping[int, Op] = {
    AUTO_CONTRAST: Op("auto contrast", lambda image, _m, _r: ImageOps.autocontrast(image)),
    EQUALIZE: Op("equalize", lambda image, _m, _r: ImageOps.equalize(image)),
    INVERT: Op("invert", lambda image, _m, _r: ImageOps.invert(image)),
    ROTATE: Op("rotate", lambda image, m, r: image.rotate(m, resample=r, fillcolor=FILL), -30, 30),
    POSTERIZE: Op("posterize", _posterize, 0, 4, is_whole=True),
    SOLARIZE: Op("solarize", lambda image, m, _r: ImageOps.solarize(image, int(m)), 0, 256, is_whole=True),
    SOLARIZE_ADD: Op("solarize add", _solarize_add, 0, 128, is_whole=True),
    COLOR: Op("colour", lambda image, m, _r: ImageEnhance.Color(image).enhance(m), 0, 2),
    CONTRAST: Op("contrast", lambda image, m, _r: ImageEnhance.Contrast(image).enhance(m), 0, 2),
    BRIGHTNESS: Op("brightness", lambda image, m, _r: ImageEnhance.Brightness(image).enhance(m), 0, 2),
    SHARPNESS: Op("sharpness", lambda image, m, _r: ImageEnhance.Sharpness(image).enhance(m), 0, 2),
    SHEAR_X: Op("shear x", lambda image, m, r: _affine(image, (1, m, 0, 0, 1, 0), r), -1, 1),
    SHEAR_Y: Op("shear y", lambda image, m, r: _affine(image, (1, 0, 0, m, 1, 0), r), -1, 1),
    TRANSLATE_X: Op("translate x", lambda image, m, r: _affine(image, (1, 0, m * image.width, 0, 1, 0), r), -1, 1),
    TRANSLATE_Y: Op("translate y", lambda image, m, r: _affine(image, (1, 0, 0, 0, 1, m * image.height), r), -1, 1),
    GREYSCALE: Op("greyscale", lambda image, _m, _r: image.convert("L").convert("RGB")),
    GAUSSIAN_BLUR: Op("blur", lambda image, m, _r: image.filter(ImageFilter.GaussianBlur(m)), 0.009, 32),
}


def apply_op(image: Image.Image, op: int, magnitude_q16: int, resample: Image.Resampling) -> Image.Image:
    """One op on an RGB image. Raises CorruptError for an op that this version does not know, or a magnitude that no draw gives."""
    if op not in OPS:
        raise CorruptError(
            f"view params: image op {op} is not known, expected 1 to {max(OPS)}; it was drawn by a later version of kdcache: install that"
        )
    if not OPS[op].allows(magnitude_q16):
        known = OPS[op]
        raise CorruptError(f"view params: image op {op} with magnitude {magnitude_q16}/65536, expected {known.lowest:g} to {known.highest:g}")
    return OPS[op].apply(image, magnitude_q16 / Q16, resample)


# --- noise -----------------------------------------------------------------------------------------------------------

BELL_MEAN = 8 * 255 // 2
"""Of the sum of a word's eight bytes."""
BELL_STEP_Q32 = 20547966
"""2³² / √(8 · (256² − 1) / 12): one step of that sum in standard deviations. A sum of eight is bell-shaped, within ±4.9."""
_NOISE_MEAN_Q16 = np.array([8105165, 7620526, 6784942], np.int64)
_NOISE_STEP_Q16 = np.array([18309, 17909, 17989], np.int64)
"""255 · ImageNet's std (.229, .224, .225) / √(8 · (256² − 1) / 12), in 1/65536 of a pixel value a step."""


def noise(seed: int, height: int, width: int) -> Pixels:
    """uint8 (height, width, 3) of noise about ImageNet's mean with ImageNet's standard deviation, clipped: a function of the seed alone.

    One Philox word (4x64, 10 rounds, counter 0, key (seed, 0)) a value, row by row, red green blue; the sum of its bytes serves as a normal draw.
    """
    words = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(height * width * 3)
    sums = words.astype("<u8").view(np.uint8).reshape(height, width, 3, 8).sum(axis=3, dtype=np.int64)
    values = (_NOISE_MEAN_Q16 + _NOISE_STEP_Q16 * (sums - BELL_MEAN) + Q16 // 2) >> 16
    erased: Pixels = values.clip(0, 255).astype(np.uint8)
    return erased


def blend(own_HW3: Pixels, partner_HW3: Pixels, weight_q16: int) -> Pixels:
    """Mixup: (own · weight + partner · (65536 − weight) + 32768) >> 16, weight in 1/65536."""
    own, partner = own_HW3.astype(np.uint32), partner_HW3.astype(np.uint32)
    mixed: Pixels = ((own * weight_q16 + partner * (Q16 - weight_q16) + Q16 // 2) >> 16).astype(np.uint8)
    return mixed
