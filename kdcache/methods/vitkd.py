"""`vitkd`: mimic the teacher's first two blocks, and generate its last one's tokens from a masked student.

Legend: B batch, N grid tokens of the teacher, D channels (s student, t teacher), H W its grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import StudentError, UsageError
from ..feature_maps import Grid, Noise, map_to_tokens, resize_map, squared_error, tokens_to_map
from ..teacher_card import TeacherCard
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings

_SHALLOW = ("blocks.0", "blocks.1")
_DEEP = "norm"


class ViTKDSettings(DistillationSettings):
    """Constants of `vitkd`: the authors', the same for all of their DeiT pairs on ImageNet."""

    alpha: float = Field(default=3e-5, ge=0)
    """Weight of the mimicked first two blocks: a sum of squares over tokens and channels."""
    beta: float = Field(default=3e-6, ge=0)
    """Weight of the generated last tokens: a sum of squares over masked tokens and channels, divided by mask_ratio."""
    mask_ratio: float = Field(default=0.5, gt=0, le=1)
    """Share of the student's last tokens that are masked (lambda)."""


class ViTKD(Method[ViTKDSettings]):
    """Shallow layers mimicked, deep layer generated."""

    name: ClassVar[str] = "vitkd"
    summary: ClassVar[str] = "ViT tokens: blocks 0 and 1 mimicked, the last generated from a masked student"
    paper: ClassVar[str] = "Yang et al.: ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation (2022), arXiv:2209.02432"
    Settings: ClassVar[type[MethodSettings]] = ViTKDSettings

    def __init__(self, **arguments: object) -> None:
        try:
            super().__init__(**arguments)  # type: ignore[arg-type]  # the base's own
        except StudentError as error:
            raise StudentError(f"{error}; method 'vitkd' needs a plain ViT for a student, mimic and mgd take any") from error
        student = [self.student_channels[node] for node in (*_SHALLOW, _DEEP)]
        teacher = [self.teacher_shapes[f"features@{node}"] for node in (*_SHALLOW, _DEEP)]
        if len({*student}) > 1 or len({shape.channels for shape in teacher}) > 1 or len({shape.grid for shape in teacher}) > 1:
            raise UsageError(
                "method 'vitkd' is for plain ViTs, whose blocks all have one width and one grid; expected that of student and teacher, found"
                f" channels {student} and {[shape.channels for shape in teacher]}; mimic and mgd take any pair"
            )
        self.grid = teacher[0].grid
        self.loss = ViTKDLoss(student[0], teacher[0].channels)
        self.noise = Noise()

    @classmethod
    def requires(cls, settings: ViTKDSettings, teacher: TeacherCard) -> Sequence[str]:
        if teacher.nodes and not set(_SHALLOW) <= set(teacher.nodes):
            raise UsageError(
                f"method 'vitkd' needs a plain ViT for a teacher, with {' and '.join(_SHALLOW)}; {teacher.model} has {', '.join(teacher.nodes)};"
                f" mimic and mgd take any teacher"
            )
        return [f"features@{node}" for node in (*_SHALLOW, _DEEP)]

    def student_nodes(self) -> Sequence[str]:
        return (*_SHALLOW, _DEEP)

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        constants = self.settings
        # resized before the adapters, which is the same as after them
        *low_s, high_s = (map_to_tokens(resize_map(outputs[f"features@{node}"], self.grid)) for node in (*_SHALLOW, _DEEP))
        *low_t, high_t = (targets[f"features@{node}"]["grid"] for node in (*_SHALLOW, _DEEP))
        noise_BN = self.noise(*high_t.shape[:2], like=high_t)
        return {
            "shallow": constants.alpha * self.loss.shallow(low_s, low_t),
            "deep": constants.beta * self.loss.deep(high_s, high_t, noise_BN, grid=self.grid, mask_ratio=constants.mask_ratio),
        }


class ViTKDLoss(nn.Module):
    """The adapters and both losses, unweighted (cls_KD `vitkd.py`; its parameters have the names that they have there)."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        same = student_channels == teacher_channels
        self.align2 = None if same else nn.ModuleList(nn.Linear(student_channels, teacher_channels) for _ in _SHALLOW)
        self.align = None if same else nn.Linear(student_channels, teacher_channels)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, teacher_channels))
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1), nn.ReLU(), nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1)
        )

    def shallow(self, low_s: Sequence[Tensor], low_t: Sequence[Tensor]) -> Tensor:
        """1/B · Σ ‖align2_i(low_s_i) - low_t_i‖² over both blocks. low_s: two (B, N, Ds); low_t: two (B, N, Dt)."""
        sums = []
        for i, (tokens_s, tokens_t) in enumerate(zip(low_s, low_t, strict=True)):
            aligned = tokens_s if self.align2 is None else self.align2[i](tokens_s)
            sums.append(squared_error(aligned, tokens_t))
        return torch.stack(sums).sum() / len(low_t[0])

    def deep(self, high_s: Tensor, high_t: Tensor, noise_BN: Tensor, *, grid: Grid, mask_ratio: float) -> Tensor:
        """1/(λB) · Σ ‖generated - high_t‖² over the masked tokens. high_s: (B, N, Ds); high_t: (B, N, Dt); noise decides what is masked.

        A token is kept if fewer than int(N · (1 - λ)) tokens of its sample have less noise.
        """
        aligned_BND = high_s if self.align is None else self.align(high_s)
        num_kept = int(high_t.shape[1] * (1 - mask_ratio))
        rank_BN = noise_BN.argsort(dim=1, stable=True).argsort(dim=1)
        masked_BN1 = (rank_BN >= num_kept).unsqueeze(2)
        visible_BND = torch.where(masked_BN1, self.mask_token.to(aligned_BND.dtype), aligned_BND)
        generated_BND = map_to_tokens(self.generation(tokens_to_map(visible_BND, grid)))
        return squared_error(generated_BND, high_t, where=masked_BN1) / (mask_ratio * len(high_t))
