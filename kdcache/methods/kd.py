"""`kd`: match the teacher's softened class probabilities, beside the labels or without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ..losses import kd
from ..teacher_card import TeacherCard
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings


class KDSettings(DistillationSettings):
    """Constants of `kd`."""

    temperature: float = Field(default=4.0, gt=0)
    """Softmax temperature of both sides; timm's default."""


class KD(Method[KDSettings]):
    """T²·KL(teacher ‖ student)."""

    name: ClassVar[str] = "kd"
    summary: ClassVar[str] = "the teacher's softened class probabilities: T²·KL"
    paper: ClassVar[str] = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015), arXiv:1503.02531"
    Settings: ClassVar[type[MethodSettings]] = KDSettings

    @classmethod
    def requires(cls, settings: KDSettings, teacher: TeacherCard) -> Sequence[str]:
        return ("logits",)

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        return {"distill": kd(outputs["logits"], targets["logits"]["logits"], temperature=self.settings.temperature)}
