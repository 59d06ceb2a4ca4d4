"""`dkd`: the teacher's confidence in the label's class and its order of the other classes, weighed apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ..losses import dkd
from ..teacher_card import TeacherCard
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings


class DKDSettings(DistillationSettings):
    """Constants of `dkd`: the authors' for ImageNet, ResNet-34 → ResNet-18. For CIFAR-100 they take temperature 4 and beta 8."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of the target class against all others."""
    beta: float = Field(default=0.5, ge=0)
    """Weight of the other classes among themselves."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of both sides."""


class DKD(Method[DKDSettings]):
    """T²·(alpha·TCKD + beta·NCKD)."""

    name: ClassVar[str] = "dkd"
    summary: ClassVar[str] = "decoupled: the target class and the order of the others, weighed apart"
    paper: ClassVar[str] = "Zhao et al.: Decoupled Knowledge Distillation (CVPR 2022), arXiv:2203.08679"
    Settings: ClassVar[type[MethodSettings]] = DKDSettings
    needs_labels: ClassVar[bool] = True

    @classmethod
    def requires(cls, settings: DKDSettings, teacher: TeacherCard) -> Sequence[str]:
        return ("logits",)

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        constants = self.settings
        logits, teacher_logits = outputs["logits"], targets["logits"]["logits"]
        return {"distill": dkd(logits, teacher_logits, labels, alpha=constants.alpha, beta=constants.beta, temperature=constants.temperature)}
