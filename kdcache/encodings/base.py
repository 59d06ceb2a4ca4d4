"""The encoding interface: everything that extract, train and the reader ask of one.

A *value* is what the teacher gave for a batch: a dict of float tensors. `logits` → {"logits": (B, K)}; `features` →
{"grid": (B, T, C)} with the grid row-major, and {"prefix": (B, P, C)} where the model has cls or register tokens.
*Components* are what is stored: a dict of tensors whose dtypes and per-row shapes `components()` states.

`encode` runs on the teacher's device, `decode` on the student's; both are pure, and `decode(encode(x))` is finite float32
for every finite x. Torch has no uint16, so a component of that type is given and taken as int16 bits. An encoding that
needs statistics gets them from its `calibrator`, which sees a few hundred views once; they are stored beside the target's card
and become part of its identity. `kdcache.testing.check_encoding` holds the checks that every encoding must pass.

An encoding is written `name` or `name=argument`; the argument is part of its `full_name` and so of the card. Its components
belong to *parts* (`parts()`): a reader may fetch the components of some parts only, and `decode` gives what they hold.

Legend: B batch, T grid tokens, P prefix tokens, C channels, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from ..format import Component, TargetIdentity


@dataclass(frozen=True, kw_only=True)
class TargetShape:
    """Shape of one view's value: `num_classes` for logits; `grid`, `channels` and `prefix_tokens` for features."""

    num_classes: int = 0
    grid: tuple[int, int] = (0, 0)
    channels: int = 0
    prefix_tokens: int = 0

    @classmethod
    def of_card(cls, card: TargetIdentity) -> TargetShape:
        """The shape that a recorded target's card states."""
        return cls(num_classes=card.num_classes or 0, grid=card.grid or (0, 0), channels=card.channels or 0, prefix_tokens=card.prefix_tokens or 0)

    @property
    def num_tokens(self) -> int:
        """Grid tokens, T."""
        return self.grid[0] * self.grid[1]


class Encoding(ABC):
    """One way to store one kind of target. Holds the shape, its argument and, after `load_calibration`, its statistics."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for help texts: what is stored, what it costs."""
    argument_name: ClassVar[str | None] = None
    """What stands behind `name=`, e.g. "K"; None for an encoding that takes no argument."""
    example: ClassVar[str] = ""
    """An argument for help texts and conformance checks."""
    needs_calibration: ClassVar[bool] = False

    def __init__(self, shape: TargetShape, argument: str | None = None) -> None:
        """argument: in canonical form, see `kdcache.targets`. Raises UsageError for one that this encoding can't have."""
        self.shape, self.argument = shape, argument
        if (argument is None) != (self.argument_name is None):
            wanted = f"an argument, e.g. {self.name}={self.example}" if self.argument_name is not None else "none"
            raise UsageError(f"encoding {self.full_name!r}: expected {wanted}, found {argument or 'none'!r}")

    @property
    def full_name(self) -> str:
        """As it stands in specs and cards."""
        return self.name if self.argument is None else f"{self.name}={self.argument}"

    @abstractmethod
    def components(self) -> dict[str, Component]:
        """Component name → zarr dtype and shape of one view of one row."""

    @abstractmethod
    def encode(self, value: Mapping[str, Tensor], labels_B: Tensor | None = None) -> dict[str, Tensor]:
        """Components of a batch, on the value's device. labels_B: int64, -1 where unknown; None if none is known."""

    @abstractmethod
    def decode(self, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """float32 value of a batch, on the components' device; exact under autocast.

        components: all of them, or all of some `parts()`; the value then holds what these parts say.
        """

    def check(self, components: Mapping[str, Tensor]) -> None:  # noqa: B027 - most decode any value
        """Raise CorruptError for values that no encoder gives and no device can decode. Of components on the host: `decode` elsewhere relies on it.

        A look at a GPU's values would let the host wait for it in every step, and such a value ends its process.
        """

    def parts(self) -> dict[str, tuple[str, ...]]:
        """Part → its components, which a reader fetches together or not at all. Every component is in one part."""
        names = tuple(self.components())
        prefix = tuple(name for name in names if name.partition("_")[0] == "prefix")
        main = tuple(name for name in names if name not in prefix)
        main_name = "logits" if self.shape.num_classes else "grid"
        return {main_name: main, "prefix": prefix} if prefix else {main_name: main}

    def components_of(self, parts: Sequence[str]) -> tuple[str, ...]:
        """The components of these parts, in order. Raises UsageError for a part that this target does not have."""
        known = self.parts()
        if not parts:
            raise UsageError(f"encoding {self.full_name!r}: no part is asked for; expected some of: {', '.join(known)}")
        for part in parts:
            if part not in known:
                raise UsageError(f"encoding {self.full_name!r}: no part {part!r} in this target; expected some of: {', '.join(known)}")
        return tuple(component for part, names in known.items() if part in parts for component in names)

    def bands(self, z_BTC: Tensor) -> dict[str, Tensor]:
        """An orthonormal split of a standardised grid, float32 (B, T, C), by part: what `Fidelity` measures beside the whole. None but for dct."""
        return {}

    def calibrator(self, target: str) -> Calibrator | None:
        """What gathers the statistics of a target called `target`; None for logits, which have none."""
        return None if self.shape.num_classes else ChannelStatistics()

    def is_near(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
        """Whether two calibrations are of one teacher: as far apart as another batch size or device could move them."""
        return found.keys() == expected.keys() and all(
            found[name].shape == tensor.shape and torch.allclose(found[name], tensor, rtol=0.05, atol=0.05 * float(tensor.abs().mean()))
            for name, tensor in expected.items()
        )

    @property
    def bytes_per_view(self) -> int:
        """Before compression."""
        sizes = {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "int32": 4, "float32": 4}
        return sum(prod(part.shape) * sizes[part.dtype] for part in self.components().values())

    def load_calibration(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the statistics that the calibrator's `result` gave."""
        self.calibration = {name: tensor.float() for name, tensor in tensors.items()}

    def calibration_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the tensors of this encoding's calibration."""
        if self.shape.num_classes:
            return {}
        shapes: dict[str, tuple[int, ...]] = {f"grid_{name}": (self.shape.channels,) for name in ("mean", "std")}
        if self.shape.prefix_tokens:
            shapes |= {f"prefix_{name}": (self.shape.prefix_tokens, self.shape.channels) for name in ("mean", "std")}
        return shapes

    def calibration_problem(self) -> str | None:
        """What is expected of the calibration that was loaded and not so, or None. A cache from elsewhere may say anything."""
        if not hasattr(self, "calibration"):
            return None
        found = {name: tuple(tensor.shape) for name, tensor in self.calibration.items()}
        if found != self.calibration_shapes():
            return f"expected tensors {self.calibration_shapes()}, found {found!r:.300}"
        for name, tensor in self.calibration.items():
            is_scale = name.endswith("_std") or name == "step"
            if not bool(tensor.isfinite().all()) or (is_scale and not bool((tensor > 0).all())):
                return f"expected finite numbers{', above 0' if is_scale else ''} in {name!r}"
        return None

    def statistic(self, name: str, device: torch.device) -> Tensor:
        """A calibration tensor on `device`, moved once."""
        tensor = self.calibration[name]
        if tensor.device != device:
            tensor = self.calibration[name] = tensor.to(device)
        return tensor


_LARGEST = 1e37
"""A value beyond it is stored as it, so that subtracting a mean can't leave float32."""
_LARGEST_Z = 1e9
"""Likewise a standardised one: squares and sums over channels stay finite."""


def standardise(tokens: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """float32 z-scores of tokens (B, N, C); mean and std as `ChannelStatistics` gives them."""
    return ((tokens.float().clamp(-_LARGEST, _LARGEST) - mean) / std).clamp_(-_LARGEST_Z, _LARGEST_Z)


def full_precision(device: torch.device) -> torch.autocast:
    """Matrix products of float32 in float32, whatever autocast is around them."""
    return torch.autocast(device.type, enabled=False)


class Calibrator(Protocol):
    """Gathers what an encoding needs to know, in memory that does not grow with the number of views."""

    def update(self, value: Mapping[str, Tensor]) -> None:
        """Add a batch of values. How views are split into batches makes no difference but for rounding."""

    def result(self) -> dict[str, Tensor]:
        """float32 tensors, for the calibration file. Raises UsageError where the encoding can't be calibrated as asked."""


STD_FLOOR = 0.1
"""Of the median channel's standard deviation: a channel 30 such deviations away then costs its token a relative error of .07, not .6."""


class ChannelStatistics:
    """Mean and standard deviation of each channel over calibration views, in float64 sums on the host: constant memory."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._sum: dict[str, Tensor] = {}
        self._sum_sq: dict[str, Tensor] = {}

    def update(self, value: Mapping[str, Tensor]) -> None:
        """Add a batch: {"grid": (B, T, C)[, "prefix": (B, P, C)]}. Grid tokens share statistics, prefix tokens have their own."""
        for part, tokens in value.items():
            wide = tokens.cpu().double()
            rows = wide.flatten(0, 1) if part == "grid" else wide
            self._count[part] = self._count.get(part, 0) + len(rows)
            self._sum[part] = self._sum.get(part, torch.zeros(())) + rows.sum(dim=0)
            self._sum_sq[part] = self._sum_sq.get(part, torch.zeros(())) + rows.square().sum(dim=0)

    def result(self) -> dict[str, Tensor]:
        """{"grid_mean", "grid_std"} (C,), {"prefix_mean", "prefix_std"} (P, C), float32.

        A channel that was silent in the calibration views may fire later: one z-score of thousands would set its token's scale
        and drown the others. So no channel's std is below STD_FLOOR of the median channel's, and a silent one gets the median.
        """
        tensors: dict[str, Tensor] = {}
        for part, count in self._count.items():
            mean, mean_sq = self._sum[part] / count, self._sum_sq[part] / count
            std = (mean_sq - mean.square()).clamp_min(0).sqrt()
            live = std > 1e-6 * mean_sq.mean().sqrt()
            median = float(std[live].median()) if live.any() else 1.0
            tensors[f"{part}_mean"] = mean.float()
            tensors[f"{part}_std"] = torch.where(live, std.clamp_min(STD_FLOOR * median), median).float()
        return tensors
