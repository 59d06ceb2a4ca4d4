"""`mgd`: generate the teacher's final map from a student's whose channels are masked at random.

Legend: B batch, C channels of the teacher, H W its grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from ..feature_maps import Noise, resize_map, squared_error, tokens_to_map
from ..teacher_card import TeacherCard
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings


class MGDSettings(DistillationSettings):
    """Constants of `mgd`: the authors' for ImageNet classification."""

    alpha: float = Field(default=7e-5, ge=0)
    """Weight: of a sum of squares over positions and channels."""
    mask_ratio: float = Field(default=0.15, ge=0, lt=1)
    """Probability of each channel of each image to be masked (lambda)."""
    node: str = "norm"
    """The teacher's node."""
    student_node: str = "norm"
    """The student's node."""


class MGD(Method[MGDSettings]):
    """alpha/B·Σ ‖conv3×3-ReLU-conv3×3(masked map) - teacher's map‖²."""

    name: ClassVar[str] = "mgd"
    summary: ClassVar[str] = "the teacher's final map, generated from a student's with masked channels"
    paper: ClassVar[str] = "Yang et al.: Masked Generative Distillation (ECCV 2022), arXiv:2205.01529"
    Settings: ClassVar[type[MethodSettings]] = MGDSettings

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)  # type: ignore[arg-type]  # the base's own
        (self.target,) = self.target_names
        shape = self.teacher_shapes[self.target]
        self.grid = shape.grid
        student, teacher = self.student_channels[self.settings.student_node], shape.channels
        self.align = None if student == teacher else nn.Conv2d(student, teacher, 1)
        self.generation = nn.Sequential(nn.Conv2d(teacher, teacher, 3, padding=1), nn.ReLU(), nn.Conv2d(teacher, teacher, 3, padding=1))
        self.noise = Noise()

    @classmethod
    def requires(cls, settings: MGDSettings, teacher: TeacherCard) -> Sequence[str]:
        return [f"features@{settings.node}"]

    def student_nodes(self) -> Sequence[str]:
        return [self.settings.student_node]

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        teacher_BCHW = tokens_to_map(targets[self.target]["grid"], self.grid)
        student_BCHW = resize_map(outputs[f"features@{self.settings.student_node}"], self.grid)
        if self.align is not None:
            student_BCHW = self.align(student_BCHW)
        visible_BC11 = self.noise(*teacher_BCHW.shape[:2], 1, 1, like=teacher_BCHW) >= self.settings.mask_ratio
        generated_BCHW = self.generation(student_BCHW * visible_BC11)
        return {"generated": self.settings.alpha * squared_error(generated_BCHW, teacher_BCHW) / len(teacher_BCHW)}
