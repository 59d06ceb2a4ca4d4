"""Distillation losses as plain functions of logits. The methods of `kdcache.methods` add weights and modules to them.

Every function upcasts to at least float32 and leaves any autocast region, so that a half-precision student gets the same loss.

Labels are class numbers, or, for mixed views, shares of the classes: `soft_labels` makes them.

Legend: B batch, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Hinton's distillation loss: T² · KL(p_t ‖ p_s), p = softmax(logits / T), mean over the batch; a scalar.

    student_logits, teacher_logits: float tensors of one shape; no gradient reaches the teacher's. The T² keeps the size of
    the gradient independent of T (arXiv:1503.02531 §2). The cross-entropy form, -T² · Σ p_t log p_s, as cls_KD and ScaleKD write it, is
    larger by T² times the teacher's entropy: a constant for the student, so that both have the same gradient. Raises ValueError for
    shapes that differ or a temperature that is not positive.
    """
    _check_same_shape(student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a number above 0")
    with torch.autocast(student_logits.device.type, enabled=False):
        log_student_BK = F.log_softmax(_at_least_float32(student_logits) / temperature, dim=1)
        log_teacher_BK = F.log_softmax(_at_least_float32(teacher_logits.detach()) / temperature, dim=1)
        return F.kl_div(log_student_BK, log_teacher_BK, reduction="batchmean", log_target=True) * temperature**2


def cross_entropy(student_logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, mean over the batch; a scalar.

    labels: int64 (B,) in [0, K), or float (B, K), the shares of the classes. smoothing: the share of each row's mass that is spread
    over all K classes, as timm's LabelSmoothingCrossEntropy and, for shares, its mixup_target do.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        logits_BK = _at_least_float32(student_logits)
        return F.cross_entropy(logits_BK, labels.to(logits_BK.dtype) if labels.is_floating_point() else labels, label_smoothing=smoothing)


def soft_labels(labels_B: Tensor, partner_labels_B: Tensor, weights_B: Tensor, num_classes: int) -> Tensor:
    """The labels of mixed views: float32 (B, K), weight on the own label and 1 - weight on the partner's.

    labels_B, partner_labels_B: int64 in [0, K). weights_B: float32 in [0, 1].
    """
    shares_BK = torch.zeros(len(labels_B), num_classes, device=labels_B.device)
    shares_BK.scatter_add_(1, labels_B[:, None], weights_B[:, None])
    return shares_BK.scatter_add_(1, partner_labels_B[:, None], 1 - weights_B[:, None])


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_same_shape(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"expected student and teacher logits of one shape (batch, classes),"
            f" found {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
