"""What happens to an image in a view: `draw`, and `draw_mix` for the partner of a mixed one. Numbers only, no pixels; `views` renders.

A pure function of (plan, shard, key, view, image size): raw Philox words keyed by a hash, mapped to numbers by
integer arithmetic of our own, since NumPy's distributions and the platform's libm may change. No global generator, no
dependence on workers, order, rank or epoch.

Draw version 1. Key: BLAKE2b-128 of the canonical JSON [1, seed, shard, key, view], read as two little-endian uint64.
Words: the first 256 outputs of NumPy's Philox (4x64, 10 rounds) with that key and counter 0. Each feature of a policy has
words of its own, so that none shifts another: a view of "strong" has the crop and flip of the same view of "weak".

    0-39 crop, four an attempt · 40 flip · 48-79 RandAugment, four an op · 88-90 three_augment · 96-100 colour jitter
    104-105 erasing, 108-147 its box, four an attempt · 148-153 mixing · the others are kept

A mixed view is the view that the sample has without mixing, mixed with the view of the same number that its partner has
without mixing. So mixing is drawn apart, by `draw_mix`, and what can't be known without decoding, which partner is usable,
is settled by who renders (`kdcache.rendering`); the params then say which it was.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from functools import lru_cache
from itertools import permutations
from math import isqrt

import numpy as np

from . import augment
from .augment import Q16
from .plan import (
    DRAW_VERSION,
    CenterCrop,
    ColorJitter,
    MixedViews,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    ThreeAugment,
    ViewPlan,
    canonical_json,
)
from .view_params import CUTMIX, ERASE_CONSTANT, ERASE_NOISE, MIXUP, Box, Erase, Mix, ViewParams, times, weight_outside

NUM_WORDS = 256
_CROP_WORD = 0
_CROP_ATTEMPTS = 10
_FLIP_WORD = 40
_RAND_AUGMENT_WORD = 48
_THREE_AUGMENT_WORD = 88
_JITTER_WORD = 96
_ERASE_WORD = 104
_ERASE_BOX_WORD = 108
_ERASE_ATTEMPTS = 10
_MIX_WORD = 148
_RATIO_STEPS = 1024
"""Aspect ratios are drawn from this many log-spaced values: at 4/3 to 3/4 a step is 0.06 %, below a pixel."""


def random_words(seed: int, shard: str, key: str, view: int) -> list[int]:
    """The 256 raw uint64 words of one view. Philox is counter-based: the same on every machine and NumPy version."""
    digest = hashlib.blake2b(canonical_json([DRAW_VERSION, seed, shard, key, view]), digest_size=16).digest()
    words: list[int] = np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64)).random_raw(NUM_WORDS).tolist()
    return words


def draw(plan: ViewPlan, shard: str, key: str, view: int, size_wh: tuple[int, int]) -> ViewParams:
    """What happens to this sample in this view, before mixing. size_wh: width and height of the decoded image, pixels."""
    words = random_words(plan.seed, shard, key, view)
    policy = plan.policy
    if isinstance(policy.crop, CenterCrop):
        crop = _center_crop(policy.crop, size_wh)
    else:
        crop = _random_resized_crop(policy.crop, size_wh, words[_CROP_WORD : _CROP_WORD + 4 * _CROP_ATTEMPTS])
    flip = _happens(words[_FLIP_WORD], policy.hflip)
    ops: list[tuple[int, int]] = []
    if policy.three_augment is not None:
        ops += _three_augment(policy.three_augment, words[_THREE_AUGMENT_WORD:])
    if policy.rand_augment is not None:
        ops += _rand_augment(policy.rand_augment, words[_RAND_AUGMENT_WORD:])
    if policy.color_jitter is not None:
        ops += _color_jitter(policy.color_jitter, words[_JITTER_WORD:])
    erase = _erase(policy.erase, plan.size, words) if policy.erase is not None else None
    return ViewParams(crop, flip, plan.size, policy.interpolation, tuple(ops), erase, resizer=plan.resizer)


def draw_mix(plan: ViewPlan, shard: str, key: str, view: int, *, position: int, num_samples: int) -> Mix | None:
    """What is mixed into this view, or None. position: the sample's own, among all `num_samples` samples of its tar.

    The partner is another sample, each as likely; where it can't be decoded, the next position serves (cyclically, without the
    sample's own), and where none can, nothing is mixed.
    """
    policy = plan.policy.mix
    if policy is None or num_samples < 2:
        return None
    word_prob, word_switch, word_lambda, word_partner, word_x, word_y = random_words(plan.seed, shard, key, view)[_MIX_WORD : _MIX_WORD + 6]
    if not _happens(word_prob, policy.prob):
        return None
    partner = _below(word_partner, num_samples - 1)
    partner += partner >= position
    if _is_cutmix(policy, word_switch):
        box = _cutmix_box(_beta_q16(policy.cutmix_alpha, word_lambda), plan.size, word_x, word_y)
        return Mix(CUTMIX, partner, box, weight_outside(box, plan.size)) if box.width and box.height else None
    weight = _beta_q16(policy.mixup_alpha, word_lambda)
    return Mix(MIXUP, partner, Box(0, 0, 0, 0), weight) if weight < Q16 else None


# --- from words to numbers -------------------------------------------------------------------------------------------


def _below(word: int, n: int) -> int:
    """A number in [0, n) from a 64-bit word."""
    return word * n >> 64


def _between(word: int, low: int, high: int) -> int:
    """A number in [low, high]."""
    return low + _below(word, high - low + 1)


def _happens(word: int, probability: float) -> bool:
    return word < int(probability * 2**64)


def _bell_q16(word: int) -> int:
    """A standard normal draw in 1/65536, as the sum of the word's eight bytes has it: within ±4.9 standard deviations."""
    return (sum(word.to_bytes(8, "little")) - augment.BELL_MEAN) * augment.BELL_STEP_Q32 + (1 << 15) >> 16


@lru_cache(maxsize=8)
def _beta_thresholds(alpha: float) -> tuple[int, ...]:
    """⌊2⁶⁴ · F((k + ½)/1024)⌋ for k = 0 … 1023, F the distribution of Beta(alpha, alpha), from decimal arithmetic.

    F(x) = B(x) / 2B(½) for x ≤ ½, B(x) = x^α Σ c_n xⁿ / (α + n), c_0 = 1, c_n = c_(n-1) · (n − α)/n (DLMF 8.17.7); F(x) = 1 − F(1 − x) above.
    """
    with localcontext() as context:
        context.prec = 60
        a, one = Decimal(alpha), Decimal(1)

        def incomplete(x: Decimal) -> Decimal:
            total, coefficient, power = one / a, one, one
            for n in range(1, 200):
                coefficient *= (n - a) / n
                power *= x
                total += coefficient * power / (a + n)
            return total * x**a

        whole = 2 * incomplete(one / 2)
        lower = [incomplete((Decimal(k) + one / 2) / 1024) / whole for k in range(512)]
        values = [*lower, *(one - value for value in reversed(lower))]
        return tuple(int(value * 2**64) for value in values)


def _beta_q16(alpha: float, word: int) -> int:
    """A draw of Beta(alpha, alpha), rounded to 1/1024, in 1/65536."""
    return 64 * bisect_right(_beta_thresholds(alpha), word)


# --- ops -------------------------------------------------------------------------------------------------------------

_RAND_AUGMENT_OPS = tuple(range(augment.AUTO_CONTRAST, augment.TRANSLATE_Y + 1))
"""timm's fifteen, in timm's order."""
_SIGNED_OPS = (augment.ROTATE, augment.SHEAR_X, augment.SHEAR_Y, augment.TRANSLATE_X, augment.TRANSLATE_Y)
_ENHANCE_OPS = (augment.COLOR, augment.CONTRAST, augment.BRIGHTNESS, augment.SHARPNESS)


def _rand_augment(policy: RandAugment, words: Sequence[int]) -> list[tuple[int, int]]:
    """timm's RandAugment: ops with repetition, each applied with `prob`, at a level drawn about `magnitude`."""
    ops: list[tuple[int, int]] = []
    for i in range(policy.num_ops):
        word_op, word_prob, word_level, word_sign = words[4 * i : 4 * i + 4]
        if not _happens(word_prob, policy.prob):
            continue
        level = int(policy.magnitude * Q16) + (int(policy.magnitude_std * Q16) * _bell_q16(word_level) >> 16)
        op = _RAND_AUGMENT_OPS[_below(word_op, len(_RAND_AUGMENT_OPS))]
        ops.append((op, _magnitude_q16(policy, op, min(max(level, 0), 10 * Q16), negate=word_sign >= 2**63)))
    return ops


def _magnitude_q16(policy: RandAugment, op: int, level_q16: int, *, negate: bool) -> int:
    """timm's LEVEL_TO_ARG in 1/65536. level_q16: 0 to 10, in 1/65536."""
    sign = -1 if negate else 1
    if op in _SIGNED_OPS:
        largest = 30 * Q16 if op == augment.ROTATE else int(policy.translate * Q16) if op >= augment.TRANSLATE_X else times(Q16, 3, 10)
        return sign * times(level_q16, largest, 10 * Q16)
    if op in _ENHANCE_OPS and policy.increasing:
        return max(times(Q16, 1, 10), Q16 + sign * times(level_q16, 9, 100))
    if op in _ENHANCE_OPS:
        return times(level_q16, 18, 100) + times(Q16, 1, 10)
    if op == augment.SOLARIZE_ADD:
        return level_q16 * 110 // (10 * Q16) * Q16
    if op == augment.POSTERIZE:
        bits = level_q16 * 4 // (10 * Q16)
        return (4 - bits if policy.increasing else bits) * Q16
    if op == augment.SOLARIZE:
        threshold = level_q16 * 256 // (10 * Q16)
        return (256 - threshold if policy.increasing else threshold) * Q16
    return 0


def _three_augment(policy: ThreeAugment, words: Sequence[int]) -> list[tuple[int, int]]:
    word_prob, word_choice, word_sigma = words[:3]
    if not _happens(word_prob, policy.prob):
        return []
    choice = _below(word_choice, 3)
    if choice == 0:
        return [(augment.GREYSCALE, 0)]
    if choice == 1:
        return [(augment.SOLARIZE, 128 * Q16)]
    low, high = (int(value * Q16) for value in policy.sigma)
    return [(augment.GAUSSIAN_BLUR, _between(word_sigma, low, high))]


def _color_jitter(policy: ColorJitter, words: Sequence[int]) -> list[tuple[int, int]]:
    """torchvision's ColorJitter without a hue: a drawn order, a factor of each."""
    word_prob, word_order, *word_factors = words[:5]
    if not _happens(word_prob, policy.prob):
        return []
    ops: list[tuple[int, int]] = []
    strengths = (policy.brightness, policy.contrast, policy.saturation)
    for word, op, strength in zip(word_factors, (augment.BRIGHTNESS, augment.CONTRAST, augment.COLOR), strengths, strict=True):
        width = int(strength * Q16)
        ops.append((op, _between(word, Q16 - width, Q16 + width)))
    return [ops[i] for i in list(permutations(range(3)))[_below(word_order, 6)] if strengths[i] > 0]


# --- boxes -----------------------------------------------------------------------------------------------------------


def _erase(policy: RandomErasing, size: int, words: Sequence[int]) -> Erase | None:
    """timm's RandomErasing in Q32: up to ten attempts at a box that is smaller than the view on both sides, else nothing."""
    if not _happens(words[_ERASE_WORD], policy.prob):
        return None
    low, high = (int(value * 2**32) for value in policy.area)
    ratios = _ratio_table(*policy.ratio)
    for attempt in range(_ERASE_ATTEMPTS):
        word_area, word_ratio, word_left, word_top = words[_ERASE_BOX_WORD + 4 * attempt : _ERASE_BOX_WORD + 4 * attempt + 4]
        area_q32 = size * size * (low + ((high - low) * (word_area >> 32) >> 32))
        height, width = _sides(area_q32, ratios[_below(word_ratio, _RATIO_STEPS)])
        if 0 < width < size and 0 < height < size:
            box = Box(_below(word_left, size - width + 1), _below(word_top, size - height + 1), width, height)
            if policy.mode == "noise":
                return Erase(ERASE_NOISE, box, words[_ERASE_WORD + 1])
            red, green, blue = policy.color or (0, 0, 0)
            return Erase(ERASE_CONSTANT, box, red << 16 | green << 8 | blue)
    return None


def _is_cutmix(policy: MixedViews, word: int) -> bool:
    if policy.mixup_alpha > 0 and policy.cutmix_alpha > 0:
        return _happens(word, policy.switch_prob)
    return policy.cutmix_alpha > 0


def _cutmix_box(weight_q16: int, size: int, word_x: int, word_y: int) -> Box:
    """timm's rand_bbox: a square of the view's shape, its centre anywhere, cut off at the edges."""
    side = isqrt(size * size * (Q16 - weight_q16) >> 16)
    (left, right), (top, bottom) = (
        (max(0, centre - side // 2), min(size, centre + (side + 1) // 2)) for centre in (_below(word_x, size), _below(word_y, size))
    )
    return Box(left, top, right - left, bottom - top)


def _sides(area_q32: int, ratio_q32: int) -> tuple[int, int]:
    """round(√(area · ratio)), round(√(area / ratio))."""
    return (isqrt(area_q32 * ratio_q32 >> 62) + 1) // 2, (isqrt((area_q32 << 2) // ratio_q32) + 1) // 2


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
        crop_width, crop_height = _sides(area_q32, ratio_q32)
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
