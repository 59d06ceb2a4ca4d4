"""Views: `draw` decides what happens to an image, `render` does it. Both stages call these and nothing else for pixels.

`draw` is a pure function of (plan, shard, key, view, image size): raw Philox words keyed by a hash, mapped to numbers by
integer arithmetic of our own, since NumPy's distributions and the platform's libm may change. No global generator, no
dependence on workers, order, rank or epoch. `render` draws nothing: all it needs is in the params, which are stored.

Draw version 1. Key: BLAKE2b-128 of the canonical JSON [1, seed, shard, key, view], read as two little-endian uint64.
Words: the first 256 outputs of NumPy's Philox (4x64, 10 rounds) with that key and counter 0. Words 0 to 39 serve the crop,
four an attempt; word 40 the flip; 48 and up are kept for the policies to come, so that none of them shifts another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from functools import lru_cache
from math import isqrt
from typing import Any, Literal

import numpy as np
from PIL import Image

from .errors import CorruptError
from .plan import DRAW_VERSION, CenterCrop, RandomResizedCrop, ViewPlan, canonical_json

MAX_OPS = 8
NUM_WORDS = 256
_CROP_WORD = 0
_CROP_ATTEMPTS = 10
_FLIP_WORD = 40
_RATIO_STEPS = 1024
"""Aspect ratios are drawn from this many log-spaced values: at 4/3 to 3/4 a step is 0.06 %, below a pixel."""

PARAM_FIELDS: tuple[str, ...] = (
    *("crop_left", "crop_top", "crop_width", "crop_height", "flip"),
    *(f"{name}_{i}" for i in range(MAX_OPS) for name in ("op", "magnitude")),
    *("erase_mode", "erase_left", "erase_top", "erase_width", "erase_height", "erase_seed_low", "erase_seed_high"),
    *("mix_mode", "mix_partner", "mix_left", "mix_top", "mix_width", "mix_height", "mix_lambda"),
)
"""Columns of the stored int32 `params` array; FORMAT.md gives the meaning and unit of each."""


@dataclass(frozen=True)
class Box:
    """Pixels left <= x < left + width, top <= y < top + height."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Erase:
    """A rectangle of the view overwritten after all ops. mode 1: black; mode 2: noise from `seed`."""

    mode: int
    box: Box
    seed: int


@dataclass(frozen=True)
class Mix:
    """A second sample mixed in. mode 1: CutMix (its pixels inside `box`); mode 2: Mixup (weight 1 - lambda)."""

    mode: int
    partner: int
    """Position of the partner among the samples of the same tar."""
    box: Box
    lambda_q16: int
    """Weight of this sample's own label, in 1/65536."""


@dataclass(frozen=True)
class ViewParams:
    """All that `render` needs to know: what was drawn for one view, and the plan's size and filter."""

    crop: Box
    """In source pixels."""
    flip: bool
    size: int
    interpolation: Literal["bilinear", "bicubic"]
    ops: tuple[tuple[int, int], ...] = ()
    """(op number, magnitude in 1/65536) in order of application."""
    erase: Erase | None = None
    mix: Mix | None = None

    def to_row(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """int32 (len(PARAM_FIELDS),), as stored."""
        crop, erase, mix = self.crop, self.erase, self.mix
        ops = [value for op in self.ops for value in op] + [0] * (2 * (MAX_OPS - len(self.ops)))
        erased = [0] * 7
        if erase is not None:
            box = erase.box
            low, high = erase.seed & 0xFFFFFFFF, erase.seed >> 32
            erased = [erase.mode, box.left, box.top, box.width, box.height, low, high]
        mixed = [0] * 7
        if mix is not None:
            box = mix.box
            mixed = [mix.mode, mix.partner, box.left, box.top, box.width, box.height, mix.lambda_q16]
        row = [crop.left, crop.top, crop.width, crop.height, int(self.flip), *ops, *erased, *mixed]
        return np.array(row, dtype=np.int64).astype(np.uint32).view(np.int32)

    @classmethod
    def from_row(cls, row: Sequence[int] | np.ndarray[Any, Any], plan: ViewPlan) -> ViewParams:
        """The inverse of `to_row`. Raises CorruptError for values that no draw gives."""
        values = [int(value) for value in row]
        crop = Box(*values[0:4])
        ops = tuple((values[5 + 2 * i], values[6 + 2 * i]) for i in range(MAX_OPS) if values[5 + 2 * i])
        start = 5 + 2 * MAX_OPS
        erase = None
        if values[start]:
            seed = (values[start + 5] & 0xFFFFFFFF) | (values[start + 6] & 0xFFFFFFFF) << 32
            erase = Erase(values[start], Box(*values[start + 1 : start + 5]), seed)
        start += 7
        mix = Mix(values[start], values[start + 1], Box(*values[start + 2 : start + 6]), values[start + 6]) if values[start] else None
        if values[4] not in (0, 1) or min(crop.left, crop.top) < 0 or min(crop.width, crop.height) < 1:
            raise CorruptError(f"view params {values}: expected a crop box of at least one pixel and flip 0 or 1")
        return cls(crop, bool(values[4]), plan.size, plan.policy.interpolation, ops, erase, mix)


def random_words(seed: int, shard: str, key: str, view: int) -> list[int]:
    """The 256 raw uint64 words of one view. Philox is counter-based: the same on every machine and NumPy version."""
    digest = hashlib.blake2b(canonical_json([DRAW_VERSION, seed, shard, key, view]), digest_size=16).digest()
    words: list[int] = np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64)).random_raw(NUM_WORDS).tolist()
    return words


def draw(plan: ViewPlan, shard: str, key: str, view: int, size_wh: tuple[int, int]) -> ViewParams:
    """What happens to this sample in this view. size_wh: width and height of the decoded image, pixels."""
    words = random_words(plan.seed, shard, key, view)
    policy = plan.policy
    if isinstance(policy.crop, CenterCrop):
        crop = _center_crop(policy.crop, size_wh)
    else:
        crop = _random_resized_crop(policy.crop, size_wh, words[_CROP_WORD : _CROP_WORD + 4 * _CROP_ATTEMPTS])
    flip = words[_FLIP_WORD] < int(policy.hflip * 2**64)
    return ViewParams(crop, flip, plan.size, policy.interpolation)


def _below(word: int, n: int) -> int:
    """A number in [0, n) from a 64-bit word."""
    return word * n >> 64


def _center_crop(policy: CenterCrop, size_wh: tuple[int, int]) -> Box:
    width, height = size_wh
    side = max(1, int(min(width, height) * policy.crop_pct))
    return Box((width - side) // 2, (height - side) // 2, side, side)


def _random_resized_crop(policy: RandomResizedCrop, size_wh: tuple[int, int], words: Sequence[int]) -> Box:
    """torchvision's RandomResizedCrop in Q32 fixed point: up to ten attempts, then the largest central crop that fits the ratio."""
    width, height = size_wh
    low, high = (int(value * 2**32) for value in policy.scale)
    ratios = _ratio_table(*policy.ratio)
    for attempt in range(_CROP_ATTEMPTS):
        word_scale, word_ratio, word_left, word_top = words[4 * attempt : 4 * attempt + 4]
        area_q32 = width * height * (low + ((high - low) * (word_scale >> 32) >> 32))
        ratio_q32 = ratios[_below(word_ratio, _RATIO_STEPS)]
        crop_width = (isqrt(area_q32 * ratio_q32 >> 62) + 1) // 2  # round(sqrt(area * ratio))
        crop_height = (isqrt((area_q32 << 2) // ratio_q32) + 1) // 2  # round(sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return Box(_below(word_left, width - crop_width + 1), _below(word_top, height - crop_height + 1), crop_width, crop_height)
    lowest, highest = (int(value * 2**32) for value in policy.ratio)
    crop_width, crop_height = width, height
    if width << 32 < lowest * height:
        crop_height = max(1, min(height, (width << 32) // lowest))
    elif width << 32 > highest * height:
        crop_width = max(1, min(width, height * highest >> 32))
    return Box((width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height)


@lru_cache(maxsize=8)
def _ratio_table(low: float, high: float) -> tuple[int, ...]:
    """Log-spaced aspect ratios in Q32, from correctly rounded decimal arithmetic: the same on every machine."""
    with localcontext() as context:
        context.prec = 40
        log_low, log_high = Decimal(low).ln(), Decimal(high).ln()
        step = (log_high - log_low) / _RATIO_STEPS
        values = [(log_low + step * (Decimal(i) + Decimal("0.5"))).exp() * 2**32 for i in range(_RATIO_STEPS)]
        return tuple(int(value.to_integral_value(ROUND_HALF_EVEN)) for value in values)


_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def render(image: Image.Image, params: ViewParams, partner: Image.Image | None = None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The view: uint8 (size, size, 3), before any normalisation. Draws nothing.

    image: RGB, as `kdcache.images.decode_image` gives it. partner: the rendered source of a mixed view. Raises CorruptError
    for params that this version can't render or that do not fit the image.
    """
    if params.ops or params.erase is not None or params.mix is not None or partner is not None:
        raise CorruptError(f"view params {params}: image ops, erasing and mixing can't be rendered by this version of kdcache; install a later one")
    box = params.crop
    if box.left + box.width > image.width or box.top + box.height > image.height:
        raise CorruptError(f"view params: crop {box} lies outside the image of {image.width}x{image.height} pixels; the image was changed")
    view = image
    if (box.width, box.height) != image.size:
        view = view.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    view = view.resize((params.size, params.size), _RESAMPLING[params.interpolation])
    if params.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(view, dtype=np.uint8)  # a copy: torch warns of arrays that can't be written to


def pixel_digest(view: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """BLAKE2b-64 of the view's bytes in C order, as a little-endian uint64."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(view).data, digest_size=8).digest(), "little")
