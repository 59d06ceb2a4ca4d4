"""`features:bf16`: tokens as they are, in bfloat16: float32's range, relative error at most 2^-8; about 10 bits a value after compression.

For what must keep its range whatever happens: no statistics, no clipping short of the largest bfloat16. zarr has no
bfloat16, so its 16 bits are stored as uint16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..format import Component
from .base import Encoding

_BF16_MAX = torch.finfo(torch.bfloat16).max


class Bf16Features(Encoding):
    """Components `grid` and `prefix`, shaped as the value: the upper half of each float32, rounded to nearest, ties to even."""

    name: ClassVar[str] = "bf16"
    summary: ClassVar[str] = "bfloat16, relative error .002 at any range; about 10 bits a value"

    def components(self) -> dict[str, Component]:
        parts = {"grid": Component(dtype="uint16", shape=(self.shape.num_tokens, self.shape.channels))}
        if self.shape.prefix_tokens:
            parts["prefix"] = Component(dtype="uint16", shape=(self.shape.prefix_tokens, self.shape.channels))
        return parts

    def encode(self, value: Mapping[str, Tensor], labels_B: Tensor | None = None) -> dict[str, Tensor]:
        # values above the largest bfloat16 would round to infinity
        return {part: tokens.float().clamp(-_BF16_MAX, _BF16_MAX).to(torch.bfloat16).view(torch.int16) for part, tokens in value.items()}

    def decode(self, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {part: bits.view(torch.bfloat16).float() for part, bits in components.items()}
