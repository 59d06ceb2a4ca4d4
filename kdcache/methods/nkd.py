"""`nkd`: the target class at the teacher's confidence, and the other classes after both sides are normalised without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ..losses import nkd
from ..teacher_card import TeacherCard
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings


class NKDSettings(DistillationSettings):
    """Constants of `nkd`: the authors' for ImageNet CNNs. For ViT students they take gamma 1."""

    gamma: float = Field(default=1.5, ge=0)
    """Weight of the part without the target class."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of the part without the target class; the target part is always at 1."""


class NKD(Method[NKDSettings]):
    """-p_t[y]·log p_s[y] + gamma·T²·cross-entropy of the normalised other classes."""

    name: ClassVar[str] = "nkd"
    summary: ClassVar[str] = "normalised: the target class, and the others after normalising without it"
    paper: ClassVar[str] = "Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation (ICCV 2023), arXiv:2303.13005"
    Settings: ClassVar[type[MethodSettings]] = NKDSettings
    needs_labels: ClassVar[bool] = True

    @classmethod
    def requires(cls, settings: NKDSettings, teacher: TeacherCard) -> Sequence[str]:
        return ("logits",)

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        logits, teacher_logits = outputs["logits"], targets["logits"]["logits"]
        return {"distill": nkd(logits, teacher_logits, labels, gamma=self.settings.gamma, temperature=self.settings.temperature)}
