"""The losses against what the original authors' code computes, and what they promise about precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.losses import cross_entropy, kd, soft_labels

GOLDENS = Path(__file__).parent / "goldens"


def load(name: str) -> dict[str, Any]:
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def logits(arrays: dict[str, Any], *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.tensor(arrays["logit_s"], dtype=dtype, requires_grad=True), torch.tensor(arrays["logit_t"], dtype=dtype)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_and_its_gradient_equal_mdistiller(temperature: float) -> None:
    arrays = load("mdistiller_kd_dkd")
    student, teacher = logits(arrays)
    loss = kd(student, teacher, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays[f"kd_T{temperature}"]), rel=1e-5)
    np.testing.assert_allclose(student.grad, arrays[f"kd_T{temperature}.grad"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (4.0, 0.5), (4.0, 1.0)])
def test_cross_entropy_form_of_cls_kd_differs_by_the_teachers_entropy_only(temperature: float, alpha: float) -> None:
    arrays = load("kd_clskd_scalekd")
    name = f"clskd_T{temperature}_a{alpha}"
    student, teacher = logits(arrays)
    loss = alpha * kd(student, teacher, temperature=temperature)
    loss.backward()
    log_p = F.log_softmax(teacher / temperature, dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
    assert loss.item() + float(alpha * temperature**2 * entropy) == pytest.approx(float(arrays[name]), rel=1e-5)
    np.testing.assert_allclose(student.grad, arrays[f"{name}.grad"], rtol=1e-5, atol=1e-9)


def test_float32_inputs_agree_with_float64() -> None:
    arrays = load("mdistiller_kd_dkd")
    wide, narrow = (kd(*logits(arrays, dtype=dtype), temperature=4.0).item() for dtype in (torch.float64, torch.float32))
    assert narrow == pytest.approx(wide, rel=1e-5)


def test_half_precision_logits_under_autocast_are_upcast() -> None:
    student, teacher = (tensor.detach().bfloat16() for tensor in logits(load("mdistiller_kd_dkd")))
    expected = kd(student.float(), teacher.float(), temperature=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kd(student, teacher, temperature=2.0)
        task = cross_entropy(student, torch.zeros(len(student), dtype=torch.int64))
    assert found.dtype == task.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_equal_logits_give_zero_and_no_gradient_reaches_the_teacher() -> None:
    student = torch.randn(3, 5, requires_grad=True)
    teacher = student.detach().clone().requires_grad_()
    loss = kd(student, teacher, temperature=3.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert teacher.grad is None


def test_smoothing_is_timms() -> None:
    from timm.loss import LabelSmoothingCrossEntropy

    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(cross_entropy(scores, labels, smoothing=0.1), LabelSmoothingCrossEntropy(0.1)(scores, labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels_are_timms_mixed_targets(smoothing: float) -> None:
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 3])
    weights = torch.tensor([0.25, 0.0, 1.0, 0.5, 0.75, 0.125])
    expected = mixup_target(labels, 4, weights[:, None], smoothing)  # of each row and the one that mirrors it
    shares = soft_labels(labels, labels.flip(0), weights, 4)
    torch.testing.assert_close((1 - smoothing) * shares + smoothing / 4, expected)
    torch.testing.assert_close(cross_entropy(scores, shares, smoothing=smoothing), SoftTargetCrossEntropy()(scores, expected))
    whole = soft_labels(labels, labels, torch.ones(6), 4)
    torch.testing.assert_close(cross_entropy(scores, whole, smoothing=smoothing), cross_entropy(scores, labels, smoothing=smoothing))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cross_entropy(scores.bfloat16(), shares, smoothing=smoothing).dtype == torch.float32
    assert cross_entropy(scores.double(), shares).dtype == torch.float64


@pytest.mark.parametrize("shape", [(4, 5), (3, 6), (3,)])
def test_shapes_that_differ_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape \(batch, classes\).*\(3, 5\)"):
        kd(torch.zeros(3, 5), torch.zeros(shape), temperature=1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        kd(torch.zeros(3, 5), torch.zeros(3, 5), temperature=temperature)
