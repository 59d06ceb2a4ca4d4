"""`kd`: match the teacher's softened class probabilities, beside the labels or without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from ..losses import cross_entropy, kd
from .base import DecodedTargets, Method, MethodSettings


class KDSettings(MethodSettings):
    """Constants of `kd`."""

    temperature: float = Field(default=4.0, gt=0)
    """Softmax temperature of both sides; timm's default."""
    distill_loss_weight: float | None = Field(default=None, ge=0)
    task_loss_weight: float | None = Field(default=None, ge=0)
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing of the task loss; timm's default."""

    @model_validator(mode="after")
    def _check_weights(self) -> KDSettings:
        loss_weights(distill=self.distill_loss_weight, task=self.task_loss_weight)
        return self

    @property
    def weights(self) -> tuple[float, float]:
        """(distillation weight, task weight)."""
        return loss_weights(distill=self.distill_loss_weight, task=self.task_loss_weight)


class KD(Method[KDSettings]):
    """distill_weight · T²·KL(teacher ‖ student) + task_weight · cross-entropy."""

    name: ClassVar[str] = "kd"
    summary: ClassVar[str] = "the teacher's softened class probabilities: T²·KL, plus cross-entropy with the labels"
    paper: ClassVar[str] = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015), arXiv:1503.02531"
    Settings: ClassVar[type[MethodSettings]] = KDSettings

    @classmethod
    def requires(cls, settings: KDSettings) -> list[str]:  # noqa: ARG003 - no setting changes it
        return ["logits"]

    @classmethod
    def uses_labels(cls, settings: KDSettings) -> bool:
        return settings.weights[1] > 0

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        distill_weight, task_weight = self.settings.weights
        parts = {"distill": distill_weight * kd(outputs["logits"], targets["logits"]["logits"], temperature=self.settings.temperature)}
        if task_weight > 0:
            parts["task"] = task_weight * cross_entropy(outputs["logits"], labels, smoothing=self.settings.smoothing)
        return parts


def loss_weights(*, distill: float | None, task: float | None) -> tuple[float, float]:
    """(distillation weight, task weight) by timm's rule (timm 1.0.31, task/distillation.py).

    Both given: as they are. Only the task weight: the distillation weight is 1 - task. Only the distillation weight: the task
    weight is 1. None: 1 and 1. Raises ValueError for a task weight above 1 that is given alone.
    """
    if distill is not None:
        return distill, 1.0 if task is None else task
    if task is None:
        return 1.0, 1.0
    if task > 1:
        raise ValueError(f"task loss weight {task} alone gives a distillation weight of {1 - task}; expected at most 1, or both weights")
    return 1.0 - task, task
