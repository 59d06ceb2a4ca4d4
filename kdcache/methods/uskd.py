"""`uskd`: no teacher. The student's own confidence softens the label, and Zipf's law the order of the other classes.

Legend: B batch, K classes, L labels of an image: 1, or the largest 2 of soft ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..nodes import NORM, list_nodes
from ..teacher_card import TeacherCard
from .base import DecodedTargets, DistillationSettings, Method, MethodSettings

_WEAK_SMOOTHING = 0.1


class USKDSettings(DistillationSettings):
    """Constants of `uskd`: the authors'."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of the softened label."""
    beta: float = Field(default=0.1, ge=0)
    """Weight of the order of the other classes."""
    mu: float = Field(default=0.005, ge=0)
    """Weight of the label's cross-entropy with the weak head."""
    student_node: str | None = None
    """Where the weak head sits. Default: the middle block of a ViT or Mixer, the last stage but one of others."""


class USKD(Method[USKDSettings]):
    """Customised soft labels (cls_KD `uskd.py`)."""

    name: ClassVar[str] = "uskd"
    summary: ClassVar[str] = "no teacher: the label softened by the student itself, the other classes by Zipf's law"
    paper: ClassVar[str] = "Yang et al.: From Knowledge Distillation to Self-Knowledge Distillation (ICCV 2023), arXiv:2303.13005"
    Settings: ClassVar[type[MethodSettings]] = USKDSettings
    needs_labels: ClassVar[bool] = True

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)  # type: ignore[arg-type]  # the base's own
        (self.node,) = self.student_nodes()
        self.weak_head = nn.Linear(self.student_channels[self.node], int(self.student.num_classes))  # type: ignore[arg-type]  # timm's own

    @classmethod
    def requires(cls, settings: USKDSettings, teacher: TeacherCard) -> Sequence[str]:
        return ()

    def student_nodes(self) -> Sequence[str]:
        return [self.settings.student_node or middle_node(self.student)]

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, targets: DecodedTargets) -> dict[str, Tensor]:
        prefix_BPC = outputs.get(f"features@{self.node}.prefix")
        middle_BC = prefix_BPC[:, 0] if prefix_BPC is not None else outputs[f"features@{self.node}"].mean(dim=(2, 3))
        weak_BK = self.weak_head(middle_BC)
        target, other, weak = uskd_parts(outputs["logits"], weak_BK, labels)
        return {"target": self.settings.alpha * target, "other": self.settings.beta * other, "weak": self.settings.mu * weak}


def middle_node(student: nn.Module) -> str:
    """Where the originals take the features of the weak head."""
    nodes = [node for node in list_nodes(student) if node != NORM] or [NORM]
    if nodes == [f"blocks.{i}" for i in range(len(nodes))]:
        return nodes[max(len(nodes) // 2 - 1, 0)]
    return nodes[max(len(nodes) - 2, 0)]


def uskd_parts(logits: Tensor, weak_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(target, other, weak) losses, unweighted scalars. logits, weak_logits: float (B, K). labels: int64 (B,), or soft float (B, K).

    target: -Σ (p_s[y]² + V - mean_B p_s[y]²) · log p_s[y], V the label's value, the factor without a gradient. other: cross-entropy between
    Zipf's 1/rank, normalised, and the student's softmax, both without the labels. weak: cross-entropy of the weak head with the label
    smoothed by .1. The labels are those with a value: one where a soft label is one-hot. The rank is that of
    p_w / (1 - p_w[y]) + log p_s / (1 - log p_s[y]), as the authors' code has it; their formula has p_s in place of log p_s.
    """
    with torch.autocast(logits.device.type, enabled=False):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_s_BK, log_w_BK = F.log_softmax(logits.to(dtype), dim=1), F.log_softmax(weak_logits.to(dtype), dim=1)
        num_rows, num_classes = logits.shape
        if labels.ndim == 2:
            value_BL, label_BL = (part[:, :2] for part in labels.to(dtype).sort(dim=1, descending=True, stable=True))
            soft_BK = labels.to(dtype)
        else:
            value_BL, label_BL = torch.ones(num_rows, 1, dtype=dtype, device=logits.device), labels.unsqueeze(1)
            soft_BK = F.one_hot(labels, num_classes).to(dtype)

        has_value_BL = value_BL > 0
        log_target_BL = log_s_BK.gather(1, label_BL)
        confidence_BL = log_target_BL.detach().exp().square()
        factor_BL = torch.where(~has_value_BL, 0.0, confidence_BL + value_BL - confidence_BL.mean(dim=0, keepdim=True))
        target = -(factor_BL * log_target_BL).sum(dim=1).mean()

        smoothed_BK = (1 - _WEAK_SMOOTHING) * soft_BK + _WEAK_SMOOTHING / num_classes
        weak = -(smoothed_BK * log_w_BK).sum(dim=1).mean()

        weak_BK, strong_BK = log_w_BK.detach().exp(), log_s_BK.detach()
        score_BK = sum(p_BK / (1 - (p_BK.gather(1, label_BL) * has_value_BL).sum(dim=1, keepdim=True) + 1e-6) for p_BK in (weak_BK, strong_BK))
        assert isinstance(score_BK, Tensor)
        rank_BK = score_BK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        is_label_BK = torch.zeros_like(log_s_BK, dtype=torch.bool).scatter_(1, label_BL, has_value_BL)
        zipf_BK = (1.0 / (rank_BK + 1).to(dtype)).masked_fill(is_label_BK, 0.0)
        log_other_BK = logits.to(dtype).masked_fill(is_label_BK, -torch.inf).log_softmax(dim=1).masked_fill(is_label_BK, 0.0)
        zipf_B1 = zipf_BK.sum(dim=1, keepdim=True)
        share_BK = zipf_BK / torch.where(zipf_B1 == 0, 1.0, zipf_B1)  # of two classes that are both labels no other is left
        other = -(share_BK * log_other_BK).sum(dim=1).mean()
        return target, other, weak
