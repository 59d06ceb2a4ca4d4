"""`ce`: the labels alone, no teacher. The baseline that every distilled student is compared with, on the same views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ..teacher_card import TeacherCard
from .base import DecodedTargets, Method, MethodSettings


class CrossEntropySettings(MethodSettings):
    """Constants of `ce`."""

    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing; timm's default."""


class CrossEntropy(Method[CrossEntropySettings]):
    """Cross-entropy with smoothed labels: the part "task" that every method has, and no other."""

    name: ClassVar[str] = "ce"
    summary: ClassVar[str] = "labels only, no teacher: the baseline on the same views"
    paper: ClassVar[str] = ""
    Settings: ClassVar[type[MethodSettings]] = CrossEntropySettings

    @classmethod
    def requires(cls, settings: CrossEntropySettings, teacher: TeacherCard) -> Sequence[str]:
        return ()

    @classmethod
    def weights(cls, settings: CrossEntropySettings) -> tuple[float, float]:
        return 1.0, 1.0

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        return {}
