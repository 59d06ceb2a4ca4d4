"""`mimic`: the plain feature loss. A linear adapter brings the student's map to the teacher's width, and its squared error is the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ..feature_maps import map_to_tokens, resize_map, squared_error
from ..teacher_card import TeacherCard
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings


class MimicSettings(DistillationSettings):
    """Constants of `mimic`."""

    node: str = "norm"
    """The teacher's node."""
    student_node: str = "norm"
    """The student's node."""


class Mimic(Method[MimicSettings]):
    """Mean squared error between the adapted map and the teacher's, over tokens and channels."""

    name: ClassVar[str] = "mimic"
    summary: ClassVar[str] = "any feature map: a linear (1×1) adapter and the mean squared error, on the teacher's grid"
    paper: ClassVar[str] = "Romero et al.: FitNets: Hints for Thin Deep Nets (ICLR 2015), arXiv:1412.6550"
    Settings: ClassVar[type[MethodSettings]] = MimicSettings

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)  # type: ignore[arg-type]  # the base's own
        (self.target,) = self.target_names
        shape = self.teacher_shapes[self.target]
        self.grid = shape.grid
        self.adapter = nn.Linear(self.student_channels[self.settings.student_node], shape.channels)

    @classmethod
    def requires(cls, settings: MimicSettings, teacher: TeacherCard) -> Sequence[str]:
        return [f"features@{settings.node}"]

    def student_nodes(self) -> Sequence[str]:
        return [self.settings.student_node]

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        teacher_BTC = targets[self.target]["grid"]
        student_BTC = self.adapter(map_to_tokens(resize_map(outputs[f"features@{self.settings.student_node}"], self.grid)))
        return {"mimic": squared_error(student_BTC, teacher_BTC) / teacher_BTC.numel()}
