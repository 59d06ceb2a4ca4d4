"""Distillation losses as plain functions of logits. The methods of `kdcache.methods` add weights and modules to them.

Every function upcasts to at least float32 and leaves any autocast region, so that a half-precision student gets the same loss;
float64 stays float64. All work on log-probabilities, so that logits of up to 1e30, one-hot teachers and a teacher's -inf
(a class that it rules out) give finite losses and gradients. No gradient reaches the teacher.

Labels are int64 (B,), or, for mixed views, float (B, K): shares of the classes, whose rows sum to 1. `soft_labels` makes them.

Legend: B batch, K classes, y the label's class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_RULED_OUT = -1e30
"""Stands for a teacher's -inf: no probability, and no 0 · inf."""


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Hinton's distillation loss: T² · KL(p_t ‖ p_s), p = softmax(logits / T), mean over the batch; a scalar.

    student_logits, teacher_logits: float (B, K). The T² keeps the size of the gradient independent of T (arXiv:1503.02531 §2). The
    cross-entropy form, -T² · Σ p_t log p_s, as cls_KD and ScaleKD write it, is larger by T² times the teacher's entropy: a
    constant for the student, so that both have the same gradient. Raises ValueError for shapes that differ or a temperature that
    is not positive.
    """
    _check(student_logits, teacher_logits, temperature)
    with torch.autocast(student_logits.device.type, enabled=False):
        log_student_BK = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
        log_teacher_BK = F.log_softmax(_as_teacher(teacher_logits) / temperature, dim=1)
        return _divergence(log_teacher_BK, log_student_BK).mean() * temperature**2


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """-T² · Σ p_t log p_s, mean over the batch; a scalar: `kd` as cls_KD and ScaleKD write it (`kd.py`). Raises ValueError as `kd`."""
    _check(student_logits, teacher_logits, temperature)
    with torch.autocast(student_logits.device.type, enabled=False):
        log_student_BK = F.log_softmax(at_least_float32(student_logits) / temperature, dim=1)
        log_teacher_BK = F.log_softmax(_as_teacher(teacher_logits) / temperature, dim=1)
        return _cross_entropy_of(log_teacher_BK, log_student_BK).mean() * temperature**2


def dkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, beta: float, temperature: float) -> Tensor:
    """Decoupled distillation: T² · (α · TCKD + β · NCKD), mean over the batch; a scalar (arXiv:2203.08679 eq. 7, mdistiller `DKD.py`).

    TCKD: KL of the split in two, (y, all others). NCKD: KL of the softmax over the classes beside y. With α = 1 and β = 1 - p_t[y] of each
    sample their sum is `kd`. labels: soft ones count as their largest class. Raises ValueError as `kd`, and for fewer than two classes.
    """
    label_B = _check(student_logits, teacher_logits, temperature, labels)
    with torch.autocast(student_logits.device.type, enabled=False):
        student_BK, teacher_BK = at_least_float32(student_logits) / temperature, _as_teacher(teacher_logits) / temperature
        target_B = _divergence(_log_split(teacher_BK, label_B), _log_split(student_BK, label_B))
        other_B = _divergence(_log_softmax_without(teacher_BK, label_B), _log_softmax_without(student_BK, label_B))
        return (alpha * target_B + beta * other_B).mean() * temperature**2


def nkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, gamma: float, temperature: float) -> Tensor:
    """Normalised distillation: -p_t[y] · log p_s[y] - γT² · Σ_{c≠y} p̂_t[c] · log p̂_s[c], mean over the batch; a scalar.

    p is the softmax at T = 1 in the target part, whatever `temperature` is; p̂ the softmax of logits / T over the classes beside y (arXiv:2303.13005
    eq. 9, cls_KD `nkd.py`). labels: soft ones count as their largest class. Raises ValueError as `dkd`.
    """
    label_B = _check(student_logits, teacher_logits, temperature, labels)
    with torch.autocast(student_logits.device.type, enabled=False):
        student_BK, teacher_BK = at_least_float32(student_logits), _as_teacher(teacher_logits)
        log_student_B, log_teacher_B = (_at(F.log_softmax(logits, dim=1), label_B) for logits in (student_BK, teacher_BK))
        target_B = -log_teacher_B.exp() * log_student_B
        log_other_student_BK = _log_softmax_without(student_BK / temperature, label_B)
        log_other_teacher_BK = _log_softmax_without(teacher_BK / temperature, label_B)
        other_B = _cross_entropy_of(log_other_teacher_BK, log_other_student_BK)
        return (target_B + gamma * temperature**2 * other_B).mean()


def wsld(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, alpha: float, temperature: float) -> Tensor:
    """Weighted soft labels: αT² · (1 - exp(-CE_s / (CE_t + 1e-7))) · CE(p_t, p_s), mean over the batch; a scalar.

    p at temperature T; CE_s and CE_t are student's and teacher's cross-entropy with the label at T = 1, without a gradient
    (arXiv:2102.00650 eq. 11, cls_KD `wsld.py`). labels: soft ones are taken as the distribution that they are, where the originals
    know hard labels only. Raises ValueError as `kd`.
    """
    _check(student_logits, teacher_logits, temperature, labels)
    with torch.autocast(student_logits.device.type, enabled=False):
        student_BK, teacher_BK = at_least_float32(student_logits), _as_teacher(teacher_logits)
        ratio_B = _label_loss(student_BK.detach(), labels) / (_label_loss(teacher_BK, labels) + 1e-7)
        weight_B = -torch.expm1(-ratio_B)
        soft_B = _cross_entropy_of(F.log_softmax(teacher_BK / temperature, dim=1), F.log_softmax(student_BK / temperature, dim=1))
        return alpha * temperature**2 * (weight_B * soft_B).mean()


def cross_entropy(student_logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, mean over the batch; a scalar.

    labels: int64 (B,) in [0, K), or float (B, K), the shares of the classes. smoothing: the share of each row's mass that is spread
    over all K classes, as timm's LabelSmoothingCrossEntropy and, for shares, its mixup_target do.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        logits_BK = at_least_float32(student_logits)
        return F.cross_entropy(logits_BK, labels.to(logits_BK.dtype) if labels.is_floating_point() else labels, label_smoothing=smoothing)


def soft_labels(labels_B: Tensor, partner_labels_B: Tensor, weights_B: Tensor, num_classes: int) -> Tensor:
    """The labels of mixed views: float32 (B, K), weight on the own label and 1 - weight on the partner's.

    labels_B, partner_labels_B: int64 in [0, K). weights_B: float32 in [0, 1].
    """
    shares_BK = torch.zeros(len(labels_B), num_classes, device=labels_B.device)
    shares_BK.scatter_add_(1, labels_B[:, None], weights_B[:, None])
    return shares_BK.scatter_add_(1, partner_labels_B[:, None], 1 - weights_B[:, None])


# --- parts -----------------------------------------------------------------------------------------------------------


def at_least_float32(tensor: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _as_teacher(logits_BK: Tensor) -> Tensor:
    """Without a gradient, and -inf as a number that has no probability beside any other logit."""
    return at_least_float32(logits_BK.detach()).clamp_min(_RULED_OUT)


def _at(values_BK: Tensor, label_B: Tensor) -> Tensor:
    return values_BK.gather(1, label_B.unsqueeze(1)).squeeze(1)


def _divergence(log_p_BK: Tensor, log_q_BK: Tensor) -> Tensor:
    """KL(p ‖ q) of each row."""
    return (log_p_BK.exp() * (log_p_BK - log_q_BK)).sum(dim=1)


def _cross_entropy_of(log_p_BK: Tensor, log_q_BK: Tensor) -> Tensor:
    """-Σ p log q of each row."""
    return -(log_p_BK.exp() * log_q_BK).sum(dim=1)


def _label_loss(logits_BK: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits_BK, labels.to(logits_BK.dtype) if labels.is_floating_point() else labels, reduction="none")


def _without(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """(B, K - 1): every class beside the label, in order. The classes behind the label move up by one."""
    columns_1K = torch.arange(logits_BK.shape[1] - 1, device=logits_BK.device).unsqueeze(0)
    return logits_BK.gather(1, columns_1K + (columns_1K >= label_B.unsqueeze(1)))


def _log_softmax_without(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    return F.log_softmax(_without(logits_BK, label_B), dim=1)


def _log_split(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """(B, 2): log-probability of the label, and of all others together: no 1 - p that rounds to 0."""
    pair_B2 = torch.stack([_at(logits_BK, label_B), _without(logits_BK, label_B).logsumexp(dim=1)], dim=1)
    return F.log_softmax(pair_B2, dim=1)


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float, labels: Tensor | None = None) -> Tensor:
    """The label's class of each row (no rows' without labels). Raises ValueError for what the formulas can't take."""
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"expected student and teacher logits of one shape (batch, classes),"
            f" found {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a number above 0")
    if labels is None:
        return torch.empty(0, dtype=torch.int64, device=student_logits.device)
    if student_logits.shape[1] < 2:
        raise ValueError(f"expected at least 2 classes, found {student_logits.shape[1]}")
    if labels.shape != student_logits.shape[:1] and not (labels.is_floating_point() and labels.shape == student_logits.shape):
        raise ValueError(
            f"expected labels of shape {tuple(student_logits.shape[:1])}, or soft ones of {tuple(student_logits.shape)}, found {labels.dtype} of"
            f" {tuple(labels.shape)}"
        )
    return labels.argmax(dim=1) if labels.ndim == 2 else labels
