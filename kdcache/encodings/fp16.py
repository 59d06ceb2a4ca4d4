"""`features:fp16`: tokens as they are, in half precision; relative error 2e-4, about 13 bits a value after compression.

A value beyond the range of half precision is stored as the largest finite one; extract's fidelity shows if that happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..format import Component
from .base import Encoding

_FP16_MAX = 65504.0


class Fp16Features(Encoding):
    """Components `grid` and `prefix`, float16, shaped as the value."""

    name: ClassVar[str] = "fp16"
    summary: ClassVar[str] = "half precision, relative error 2e-4; about 13 bits a value"

    def components(self) -> dict[str, Component]:
        parts = {"grid": Component(dtype="float16", shape=(self.shape.num_tokens, self.shape.channels))}
        if self.shape.prefix_tokens:
            parts["prefix"] = Component(dtype="float16", shape=(self.shape.prefix_tokens, self.shape.channels))
        return parts

    def encode(self, value: Mapping[str, Tensor], labels_B: Tensor | None = None) -> dict[str, Tensor]:
        return {part: tokens.float().clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16) for part, tokens in value.items()}

    def decode(self, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {part: tokens.float() for part, tokens in components.items()}
