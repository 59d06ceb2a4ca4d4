"""The view plan: everything that decides which pixels the teacher sees. Read by both stages, before anything else.

A cache holds exactly one plan. Its fingerprint is the BLAKE2b-128 of its canonical JSON, so that two caches with the
same fingerprint hold the same views, whoever made them. This file is data only; `kdcache.draws` draws from it, `kdcache.views` renders.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import MismatchError

DRAW_VERSION = 1
"""Bumped whenever `kdcache.draws.draw` maps the same random words to other parameters."""


def canonical_json(value: Any) -> bytes:
    """ASCII JSON with sorted keys and no white space; floats as their shortest round-trip decimal (Python's ``repr``)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def blake2b_128(data: bytes) -> str:
    """BLAKE2b with a 16-byte digest, as 32 lower-case hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class FrozenModel(BaseModel):
    """A value that is checked when it is made, can't change, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; fields that are None are left out, so that a field added later leaves old digests alone."""
        return self.model_dump(mode="json", exclude_none=True)


class CenterCrop(FrozenModel):
    """The centred square of ``crop_pct`` of the shorter side (timm's evaluation crop)."""

    kind: Literal["center"] = "center"
    crop_pct: float = Field(default=0.875, gt=0, le=1)


class RandomResizedCrop(FrozenModel):
    """Inception-style crop: area uniform in ``scale``, aspect ratio log-uniform in ``ratio``, ten attempts."""

    kind: Literal["random_resized"] = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    """Fraction of the image's area, low and high, in (0, 1]."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width over height, low and high."""

    @model_validator(mode="after")
    def _check_ranges(self) -> RandomResizedCrop:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must satisfy 0 < low <= high <= 1, found {self.scale}")
        if not 0.01 <= self.ratio[0] <= self.ratio[1] <= 100:
            raise ValueError(f"ratio must satisfy 0.01 <= low <= high <= 100, found {self.ratio}")
        return self


class ThreeAugment(FrozenModel):
    """DeiT III's first step: one of greyscale, solarize at 128 and Gaussian blur, each as likely (arXiv:2204.07118 §3.3)."""

    prob: float = Field(default=1.0, ge=0, le=1)
    """Probability that any of them happens."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, pixels of the view: uniform from low to high."""

    @model_validator(mode="after")
    def _check_ranges(self) -> ThreeAugment:
        _check_range("sigma", self.sigma, lowest=0.01, highest=32)
        return self


class RandAugment(FrozenModel):
    """RandAugment with timm's ops and magnitudes (timm 1.0.31, data/auto_augment.py; arXiv:1909.13719)."""

    num_ops: int = Field(default=2, ge=1, le=8)
    """Ops drawn, with repetition, from timm's fifteen."""
    magnitude: float = Field(default=9.0, ge=0, le=10)
    """Mean strength of an op, 0 to 10."""
    magnitude_std: float = Field(default=0.0, ge=0, le=100)
    """Standard deviation of the strength, which is clipped to 0 to 10."""
    increasing: bool = True
    """timm's `inc1`: every op is stronger with a higher magnitude."""
    prob: float = Field(default=0.5, ge=0, le=1)
    """Probability that a drawn op is applied."""
    translate: float = Field(default=0.45, ge=0, le=1)
    """Largest translation, fraction of the side."""


class ColorJitter(FrozenModel):
    """Brightness, contrast and saturation, each by a factor uniform in 1 ± strength, in a drawn order (torchvision's ColorJitter)."""

    prob: float = Field(default=1.0, ge=0, le=1)
    brightness: float = Field(default=0.0, ge=0, le=1)
    contrast: float = Field(default=0.0, ge=0, le=1)
    saturation: float = Field(default=0.0, ge=0, le=1)


class RandomErasing(FrozenModel):
    """One rectangle of the view overwritten, with timm's distribution (timm 1.0.31, data/random_erasing.py; arXiv:1708.04896)."""

    prob: float = Field(default=0.25, ge=0, le=1)
    mode: Literal["noise", "constant"] = "noise"
    """noise: every value drawn about ImageNet's mean with its standard deviation (timm's `pixel`). constant: `color`."""
    color: tuple[int, int, int] | None = None
    """Red, green, blue of mode constant, 0 to 255. Default: black."""
    area: tuple[float, float] = (0.02, 1 / 3)
    """Fraction of the view's area, low and high."""
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Height over width, low and high."""

    @model_validator(mode="after")
    def _check_ranges(self) -> RandomErasing:
        _check_range("area", self.area, lowest=0, highest=1)
        _check_range("ratio", self.ratio, lowest=0.01, highest=100)
        if self.color is not None and self.mode != "constant":
            raise ValueError(f"color belongs to mode 'constant', found mode {self.mode!r}")
        if self.color is not None and not all(0 <= value <= 255 for value in self.color):
            raise ValueError(f"color must be three numbers from 0 to 255, found {self.color}")
        return self


class MixedViews(FrozenModel):
    """Mixup and CutMix with another sample of the same tar, by timm's meanings of its arguments (timm 1.0.31, data/mixup.py, mode `elem`)."""

    prob: float = Field(default=1.0, ge=0, le=1)
    """Probability that a view is mixed."""
    switch_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability of CutMix where both are on."""
    mixup_alpha: float = Field(default=0.0, ge=0, le=32)
    """Weight of the view itself is drawn from Beta(alpha, alpha). 0: no Mixup (arXiv:1710.09412)."""
    cutmix_alpha: float = Field(default=0.0, ge=0, le=32)
    """Likewise of CutMix (arXiv:1905.04899)."""

    @model_validator(mode="after")
    def _check_alphas(self) -> MixedViews:
        alphas = (self.mixup_alpha, self.cutmix_alpha)
        if not max(alphas) > 0 or any(0 < alpha < 0.01 for alpha in alphas):
            raise ValueError(f"mixup_alpha or cutmix_alpha must be at least 0.01, found {alphas[0]:g} and {alphas[1]:g}")
        return self


def _check_range(name: str, pair: tuple[float, float], *, lowest: float, highest: float) -> None:
    if not (lowest <= pair[0] <= pair[1] <= highest and pair[1] > 0):
        raise ValueError(f"{name} must satisfy {lowest:g} <= low <= high <= {highest:g}, found {pair}")


MAX_OPS = 8
"""Image ops that the params of a view have room for."""


class Policy(FrozenModel):
    """An augmentation policy: what may happen to an image between the tar and the uint8 view, in the order of the fields."""

    crop: Annotated[CenterCrop | RandomResizedCrop, Field(discriminator="kind")]
    hflip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a horizontal flip."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Of the crop, and of the ops that rotate, shear and translate."""
    three_augment: ThreeAugment | None = None
    rand_augment: RandAugment | None = None
    color_jitter: ColorJitter | None = None
    erase: RandomErasing | None = None
    mix: MixedViews | None = None

    @model_validator(mode="after")
    def _check_num_ops(self) -> Policy:
        count = (self.three_augment is not None) + (self.rand_augment.num_ops if self.rand_augment else 0) + 3 * (self.color_jitter is not None)
        if count > MAX_OPS:
            raise ValueError(f"three_augment (1 op), rand_augment (num_ops) and color_jitter (3) come to {count} ops, expected at most {MAX_OPS}")
        return self

    @property
    def is_random(self) -> bool:
        """Whether two views of one sample can differ."""
        jitter = self.color_jitter
        jitters = jitter is not None and jitter.prob > 0 and max(jitter.brightness, jitter.contrast, jitter.saturation) > 0
        others = (self.three_augment, self.rand_augment, self.erase, self.mix)
        return self.crop.kind != "center" or 0 < self.hflip < 1 or jitters or any(one is not None and one.prob > 0 for one in others)


POLICIES: dict[str, Policy] = {
    "none": Policy(crop=CenterCrop()),
    "weak": Policy(crop=RandomResizedCrop(), hflip=0.5),
    "strong": Policy(
        crop=RandomResizedCrop(),
        hflip=0.5,
        rand_augment=RandAugment(num_ops=2, magnitude=9, magnitude_std=0.5),
        erase=RandomErasing(prob=0.25, mode="noise"),
    ),
    "3aug": Policy(
        crop=RandomResizedCrop(),
        hflip=0.5,
        three_augment=ThreeAugment(),
        color_jitter=ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
    ),
}


DecoderName: TypeAlias = Literal["pillow", "simplejpeg"]
"""simplejpeg: libjpeg-turbo for plain JPEGs, Pillow for all else (`kdcache.images`)."""
ResizerName: TypeAlias = Literal["pillow", "torch"]
"""torch: `interpolate` on uint8, antialiased; the same filters as Pillow's, in fewer bits (`kdcache.views`)."""
StoredCodec: TypeAlias = Literal["jpeg95", "png", "raw"]
"""jpeg95: JPEG of quality 95 without chroma subsampling. png, raw: without loss."""


class ViewPlan(FrozenModel):
    """Dataset id, policy, size, seed and the code that renders: view v means the same in every cache with this plan."""

    dataset: str = Field(min_length=1, max_length=200)
    """Given by the user; tells apart two datasets whose shards happen to share names."""
    policy: Policy
    size: int = Field(ge=1, le=4096)
    """Side of the square view, pixels."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    decoder: DecoderName = "pillow"
    resizer: ResizerName = "pillow"
    draw_version: Literal[1] = 1
    stored_views: StoredCodec | None = None
    """How the rendered views are stored, if they are: the view is then what the stored bytes decode to (`kdcache.stored_views`)."""

    @property
    def fingerprint(self) -> str:
        """BLAKE2b-128 of the plan's canonical JSON, 32 hex digits."""
        return blake2b_128(canonical_json(self.to_json()))

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages whose versions may decide pixels, as they are installed."""
        named = (self.decoder if self.decoder != "pillow" else None, self.resizer if self.resizer != "pillow" else None)
        return ("pillow", *(name for name in named if name is not None))


def require_same(what: str, expected: FrozenModel, found: FrozenModel, *, remedy: str) -> None:
    """Raise MismatchError naming the first field in which `found` (this run) differs from `expected` (the cache)."""
    difference = _first_difference("", expected.to_json(), found.to_json())
    if difference is not None:
        field, expected_value, found_value = difference
        raise MismatchError(what, field, expected=expected_value, found=found_value, remedy=remedy)


def _first_difference(path: str, expected: Any, found: Any) -> tuple[str, Any, Any] | None:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            difference = _first_difference(f"{path}.{key}" if path else key, expected.get(key), found.get(key))
            if difference is not None:
                return difference
        return None
    return None if expected == found else (path, expected, found)


def explain_validation_error(error: ValidationError) -> str:
    """One line per wrong field: its path, what was expected, what was found."""
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or '(root)'}: {item['msg']}, found {item.get('input')!r:.80}" for item in error.errors())
