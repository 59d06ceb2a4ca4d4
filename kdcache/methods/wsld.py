"""`wsld`: soft labels that weigh more where the student does worse on the label than the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ..losses import wsld
from ..teacher_card import TeacherCard
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings


class WSLDSettings(DistillationSettings):
    """Constants of `wsld`: the authors' for ImageNet. For CIFAR-100 they take temperature 4 and alpha 2.25."""

    alpha: float = Field(default=2.5, ge=0)
    """Weight of the soft labels."""
    temperature: float = Field(default=2.0, gt=0)
    """Softmax temperature of both sides."""


class WSLD(Method[WSLDSettings]):
    """alpha·T²·weight·cross-entropy with the teacher, weight = 1 - exp(-CE_student / CE_teacher)."""

    name: ClassVar[str] = "wsld"
    summary: ClassVar[str] = "weighted soft labels: more where the student does worse on the label than the teacher"
    paper: ClassVar[str] = "Zhou et al.: Rethinking Soft Labels for Knowledge Distillation (ICLR 2021), arXiv:2102.00650"
    Settings: ClassVar[type[MethodSettings]] = WSLDSettings
    needs_labels: ClassVar[bool] = True

    @classmethod
    def requires(cls, settings: WSLDSettings, teacher: TeacherCard) -> Sequence[str]:
        return ("logits",)

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        logits, teacher_logits = outputs["logits"], targets["logits"]["logits"]
        return {"distill": wsld(logits, teacher_logits, labels, alpha=self.settings.alpha, temperature=self.settings.temperature)}
