"""The view plan: everything that decides which pixels the teacher sees. Read by both stages, before anything else.

A cache holds exactly one plan. Its fingerprint is the BLAKE2b-128 of its canonical JSON, so that two caches with the
same fingerprint hold the same views, whoever made them. This file is data only; `kdcache.views` draws and renders from it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import MismatchError, UsageError

DRAW_VERSION = 1
"""Bumped whenever `kdcache.views.draw` maps the same random words to other parameters."""


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


class Policy(FrozenModel):
    """An augmentation policy: what may happen to an image between the tar and the uint8 view."""

    crop: Annotated[CenterCrop | RandomResizedCrop, Field(discriminator="kind")]
    hflip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a horizontal flip."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    @property
    def is_random(self) -> bool:
        """Whether two views of one sample can differ."""
        return self.crop.kind != "center" or 0 < self.hflip < 1


POLICIES: dict[str, Policy] = {
    "none": Policy(crop=CenterCrop()),
    "weak": Policy(crop=RandomResizedCrop(), hflip=0.5),
}


def parse_policy(name: str) -> Policy:
    """The policy called `name`. Raises UsageError that lists the known ones."""
    if name not in POLICIES:
        raise UsageError(f"augmentation policy {name!r} is not known; expected one of: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]


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
    decoder: Literal["pillow"] = "pillow"
    resizer: Literal["pillow"] = "pillow"
    draw_version: Literal[1] = 1
    stored_views: StoredCodec | None = None
    """How the rendered views are stored, if they are: the view is then what the stored bytes decode to (`kdcache.stored_views`)."""

    @property
    def fingerprint(self) -> str:
        """BLAKE2b-128 of the plan's canonical JSON, 32 hex digits."""
        return blake2b_128(canonical_json(self.to_json()))


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
