"""The params of a view: all that was drawn for it, as values and as the row of numbers that is stored. Between `draws` and `views`.

`kdcache.draws` makes them, the cache keeps them (FORMAT.md §3), `kdcache.views` renders from them. What is read from a cache is checked
here: values that no draw gives are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .augment import OPS, Q16
from .errors import CorruptError
from .plan import MAX_OPS, ResizerName, ViewPlan

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


ERASE_CONSTANT, ERASE_NOISE = 1, 2
CUTMIX, MIXUP = 1, 2


@dataclass(frozen=True)
class Erase:
    """A rectangle of the view overwritten after all ops."""

    mode: int
    """ERASE_CONSTANT or ERASE_NOISE."""
    box: Box
    seed: int
    """Of the noise (`augment.noise`), 64 bits; of a constant its colour, red · 65536 + green · 256 + blue: 0 is black."""


@dataclass(frozen=True)
class Mix:
    """A second sample mixed in, after everything else."""

    mode: int
    """CUTMIX: the partner's pixels inside `box`. MIXUP: every pixel is the weighted mean; the box is 0, 0, 0, 0."""
    partner: int
    """Position of the partner among all samples of the same tar."""
    box: Box
    lambda_q16: int
    """Weight of this sample's own pixels and label, in 1/65536; of CutMix the share of the view outside the box."""


@dataclass(frozen=True)
class ViewParams:
    """All that `render` needs to know: what was drawn for one view, and the plan's size, filter and resizer."""

    crop: Box
    """In source pixels."""
    flip: bool
    size: int
    interpolation: Literal["bilinear", "bicubic"]
    ops: tuple[tuple[int, int], ...] = ()
    """(op number, magnitude in 1/65536) in order of application."""
    erase: Erase | None = None
    mix: Mix | None = None
    resizer: ResizerName = "pillow"

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
        params = cls(crop, bool(values[4]), plan.size, plan.policy.interpolation, ops, erase, mix, plan.resizer)
        problem = params._problem() or params._foreign(plan)
        if problem is None and params.to_row().tolist() != values:
            problem = "flip 0 or 1, ops without a gap, and zeros in what is not used"
        if problem is not None:
            raise CorruptError(f"view params {values}: expected {problem}; the cache was damaged, or written by a later version of kdcache")
        return params

    @property
    def unmixed(self) -> ViewParams:
        """The same view without its partner."""
        return replace(self, mix=None) if self.mix is not None else self

    def _foreign(self, plan: ViewPlan) -> str | None:
        policy = plan.policy
        has_ops = policy.three_augment is not None or policy.rand_augment is not None or policy.color_jitter is not None
        if (self.ops and not has_ops) or (self.erase and policy.erase is None) or (self.mix and policy.mix is None):
            return "nothing that the plan's policy does not do"
        return None

    def _problem(self) -> str | None:
        """What is expected and not so, in values that no draw gives; a crop's right and bottom edge are the image's to judge."""
        crop, erase, mix = self.crop, self.erase, self.mix
        if min(crop.left, crop.top) < 0 or min(crop.width, crop.height) < 1:
            return "a crop box of at least one pixel"
        for op, magnitude in self.ops:
            if op not in OPS or not OPS[op].allows(magnitude):
                return f"image ops 1 to {max(OPS)} with their magnitudes, found op {op} with {magnitude}"
        if erase is not None:
            if erase.mode not in (ERASE_CONSTANT, ERASE_NOISE) or not _lies_within(erase.box, self.size):
                return f"erase mode 0, 1 or 2 and a box inside the view of {self.size} pixels"
            if erase.mode == ERASE_CONSTANT and erase.seed >= 1 << 24:
                return "a colour of three bytes"
        if mix is None:
            return None
        if mix.mode == CUTMIX:
            fits = _lies_within(mix.box, self.size) and mix.lambda_q16 == weight_outside(mix.box, self.size)
        else:
            fits = mix.mode == MIXUP and mix.box == Box(0, 0, 0, 0) and 0 <= mix.lambda_q16 < Q16
        return None if fits and mix.partner >= 0 else "mix mode 0, 1 or 2 with a partner, a box inside the view and the weight that belongs to it"


def _lies_within(box: Box, size: int) -> bool:
    """Whether the box has pixels, and all of them in a view of this side."""
    return min(box.left, box.top) >= 0 and min(box.width, box.height) >= 1 and box.left + box.width <= size and box.top + box.height <= size


def weight_outside(box: Box, size: int) -> int:
    """The share of the view outside the box, in 1/65536, rounded half up."""
    return Q16 - times(box.width * box.height, Q16, size * size)


def times(value: int, numerator: int, denominator: int) -> int:
    """value · numerator / denominator, rounded half up."""
    return (value * numerator + denominator // 2) // denominator
