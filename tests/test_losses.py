"""The losses against what the original authors' code computes, and what they promise about precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import load_golden
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.losses import cross_entropy, dkd, kd, nkd, soft_labels, wsld


def logits(arrays: dict[str, Any], *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.tensor(arrays["logit_s"], dtype=dtype, requires_grad=True), torch.tensor(arrays["logit_t"], dtype=dtype)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_and_its_gradient_equal_mdistiller(temperature: float) -> None:
    arrays = load_golden("mdistiller_kd_dkd")
    student, teacher = logits(arrays)
    loss = kd(student, teacher, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays[f"kd_T{temperature}"]), rel=1e-5)
    np.testing.assert_allclose(student.grad, arrays[f"kd_T{temperature}.grad"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (4.0, 0.5), (4.0, 1.0)])
def test_cross_entropy_form_of_cls_kd_differs_by_the_teachers_entropy_only(temperature: float, alpha: float) -> None:
    arrays = load_golden("kd_clskd_scalekd")
    name = f"clskd_T{temperature}_a{alpha}"
    student, teacher = logits(arrays)
    loss = alpha * kd(student, teacher, temperature=temperature)
    loss.backward()
    log_p = F.log_softmax(teacher / temperature, dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
    assert loss.item() + float(alpha * temperature**2 * entropy) == pytest.approx(float(arrays[name]), rel=1e-5)
    np.testing.assert_allclose(student.grad, arrays[f"{name}.grad"], rtol=1e-5, atol=1e-9)


def check_golden(arrays: dict[str, Any], name: str, loss: Tensor, student: Tensor) -> None:
    loss.backward()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(float(arrays[name]), rel=1e-5)
    np.testing.assert_allclose(student.grad, arrays[f"{name}.grad"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (4.0, 8.0)])
def test_dkd_and_its_gradient_equal_mdistiller(temperature: float, beta: float) -> None:
    arrays = load_golden("mdistiller_kd_dkd")
    student, teacher = logits(arrays)
    loss = dkd(student, teacher, torch.tensor(arrays["label"]), alpha=1.0, beta=beta, temperature=temperature)
    check_golden(arrays, f"dkd_T{temperature}_a1.0_b{beta}", loss, student)


@pytest.mark.parametrize(
    ("name", "labels", "temperature", "gamma"),
    [("nkd", "label", 1.0, 1.5), ("nkd", "label", 1.0, 1.0), ("nkd", "label", 2.0, 1.5), ("nkd_softlabel", "soft_label", 1.0, 1.0)],
)
def test_nkd_and_its_gradient_equal_cls_kd(name: str, labels: str, temperature: float, gamma: float) -> None:
    arrays = load_golden("nkd")
    student, teacher = logits(arrays)
    loss = nkd(student, teacher, torch.tensor(arrays[labels]), gamma=gamma, temperature=temperature)
    check_golden(arrays, f"{name}_T{temperature}_g{gamma}", loss, student)


def test_wsld_equals_its_formula_written_out() -> None:
    arrays = load_golden("nkd")
    student, teacher = logits(arrays)
    labels = arrays["label"]
    s, t = student.detach().numpy(), teacher.numpy()

    def softmax(z: Any) -> Any:
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

    rows = np.arange(len(labels))
    ce_s, ce_t = (-np.log(softmax(z)[rows, labels]) for z in (s, t))
    soft = -(softmax(t / 2) * np.log(softmax(s / 2))).sum(axis=1)
    weight = 1 - np.exp(-ce_s / (ce_t + 1e-7))
    loss = wsld(student, teacher, torch.tensor(labels), alpha=2.5, temperature=2.0)
    assert loss.item() == pytest.approx(float(2.5 * 4 * (weight * soft).mean()), rel=1e-9)
    loss.backward()
    expected = 2.5 * 4 * weight[:, None] * (softmax(s / 2) - softmax(t / 2)) / 2 / len(labels)  # the weight has no gradient
    np.testing.assert_allclose(student.grad, expected, rtol=1e-9, atol=1e-12)


ALL = {
    "kd": lambda s, t, y, temperature: kd(s, t, temperature=temperature),
    "dkd": lambda s, t, y, temperature: dkd(s, t, y, alpha=1.0, beta=8.0, temperature=temperature),
    "nkd": lambda s, t, y, temperature: nkd(s, t, y, gamma=1.5, temperature=temperature),
    "wsld": lambda s, t, y, temperature: wsld(s, t, y, alpha=2.5, temperature=temperature),
}


@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(0.5, 8), st.floats(0.1, 20))
def test_dkd_is_kd_taken_apart(seed: int, num_classes: int, temperature: float, scale: float) -> None:
    """KD = TCKD + (1 - p_t[y]) · NCKD for each sample (Zhao et al. eq. 6): DKD at α = β = 1 is KD + p_t[y] · NCKD."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, 1, num_classes, generator=generator, dtype=torch.float64)
    label = torch.randint(num_classes, (1,), generator=generator)
    p = float(F.softmax(teacher / temperature, dim=1)[0, label])
    target, other, both = (
        float(dkd(student, teacher, label, alpha=alpha, beta=beta, temperature=temperature)) for alpha, beta in ((1, 0), (0, 1), (1, 1))
    )
    whole = float(kd(student, teacher, temperature=temperature))
    assert target + (1 - p) * other == pytest.approx(whole, rel=1e-9, abs=1e-9)
    assert both - p * other == pytest.approx(whole, rel=1e-9, abs=1e-9)


@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(0.5, 8), st.floats(-50, 50))
def test_the_non_target_part_of_nkd_is_blind_to_the_target_logit(seed: int, num_classes: int, temperature: float, moved: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (5,), generator=generator)

    def non_target(s: Tensor, t: Tensor) -> float:
        return float(nkd(s, t, labels, gamma=1.0, temperature=temperature) - nkd(s, t, labels, gamma=0.0, temperature=temperature))

    at_label = F.one_hot(labels, num_classes) * moved
    expected = non_target(student, teacher)
    assert non_target(student + at_label, teacher) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert non_target(student, teacher + at_label) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    if num_classes > 2:
        beside = F.one_hot((labels + 1) % num_classes, num_classes) * 3.0
        assert non_target(student + beside, teacher) != pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    labels = torch.tensor([2, 0, 1])
    wide = torch.tensor([[1e4, -1e4, 0.0, 5.0], [-1e4, 1e4, 1e4, -1e4], [0.0, 0.0, 0.0, 0.0]])
    sure = torch.full((3, 4), -1e4).scatter(1, labels[:, None], 1e4)
    top_1 = torch.full((3, 4), -torch.inf).scatter(1, labels[:, None], 3.0)
    top_2 = torch.full((3, 4), -torch.inf).scatter(1, torch.tensor([[0, 1]] * 3), 3.0)
    for teacher in (wide, -wide, sure, -sure, top_1, top_2):
        for values in (wide, -wide, sure, -sure):
            for temperature in (0.5, 1.0, 20.0):
                student = values.to(dtype, copy=True).requires_grad_()
                loss = ALL[name](student, teacher, labels, temperature)
                loss.backward()
                assert loss.isfinite()
                assert student.grad is not None
                assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_half_precision_under_autocast_and_a_teacher_without_gradient(name: str) -> None:
    arrays = load_golden("nkd")
    student, teacher = (tensor.detach().bfloat16() for tensor in logits(arrays))
    labels = torch.tensor(arrays["label"])
    expected = ALL[name](student.float(), teacher.float(), labels, 2.0)
    leaf = teacher.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ALL[name](student.requires_grad_(), leaf, labels, 2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.backward()
    assert leaf.grad is None


@pytest.mark.parametrize("name", ALL)
def test_a_one_hot_soft_label_is_the_hard_one(name: str) -> None:
    arrays = load_golden("nkd")
    student, teacher = logits(arrays)
    labels = torch.tensor(arrays["label"])
    soft = F.one_hot(labels, student.shape[1]).float()
    torch.testing.assert_close(ALL[name](student, teacher, soft, 2.0), ALL[name](student, teacher, labels, 2.0))
    torch.testing.assert_close(cross_entropy(student, soft, smoothing=0.1), cross_entropy(student, labels, smoothing=0.1))


def test_wsld_weighs_by_the_soft_label_itself() -> None:
    arrays = load_golden("nkd")
    student, teacher = (tensor.detach() for tensor in logits(arrays))
    soft = torch.tensor(arrays["soft_label"], dtype=torch.float64)
    found = wsld(student, teacher, soft, alpha=1.0, temperature=1.0)
    ratio = F.cross_entropy(student, soft, reduction="none") / (F.cross_entropy(teacher, soft, reduction="none") + 1e-7)
    expected = ((1 - (-ratio).exp()) * F.cross_entropy(student, teacher.softmax(1), reduction="none")).mean()
    torch.testing.assert_close(found, expected)
    assert (soft.amax(dim=1) < 1).any()


@pytest.mark.parametrize("labels", [torch.zeros(4, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 4)])
def test_labels_of_another_shape_are_refused(labels: Tensor) -> None:
    for name in ("dkd", "nkd", "wsld"):
        with pytest.raises(ValueError, match=r"expected labels of shape \(3,\), or soft ones of \(3, 5\)"):
            ALL[name](torch.zeros(3, 5), torch.zeros(3, 5), labels, 1.0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        nkd(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), gamma=1.0, temperature=1.0)


def test_float32_inputs_agree_with_float64() -> None:
    arrays = load_golden("mdistiller_kd_dkd")
    wide, narrow = (kd(*logits(arrays, dtype=dtype), temperature=4.0).item() for dtype in (torch.float64, torch.float32))
    assert narrow == pytest.approx(wide, rel=1e-5)


def test_half_precision_logits_under_autocast_are_upcast() -> None:
    student, teacher = (tensor.detach().bfloat16() for tensor in logits(load_golden("mdistiller_kd_dkd")))
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
