"""Losses on feature maps against what the authors' code computes, their promises, and students' maps without a second pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TINY_VIT, TINY_VIT_ARGS, assert_same_state, load_golden, make_cache, perturb, state_of, tiny_model
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import pipelines.training.checkpoints
from kdcache import methods
from kdcache.cache import Cache
from kdcache.encodings.dct import BANDS
from kdcache.errors import StudentError, UsageError
from kdcache.feature_maps import Noise, band_mask, dct2, map_to_tokens, resize_map, tokens_to_map
from kdcache.methods.base import Method
from kdcache.methods.uskd import middle_node, uskd_parts
from kdcache.methods.vitkd import ViTKDLoss
from kdcache.nodes import capture, list_nodes
from kdcache.opening import open_cache
from kdcache.student_features import StudentFeatures
from kdcache.students import build_student, input_size_for
from pipelines.train import TrainConfig, train

STUDENT_ARGS: dict[str, Any] = {"patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2, "drop_path_rate": 0.1}
FEATURES = ("features@blocks.0", "features@blocks.1", "features@norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    make_cache(folder, num_shards=1, num_samples=6, views=2, targets=("logits", *(f"{name}:fp16" for name in FEATURES)))
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return open_cache(folder / "cache")


def build(name: str, cache: Cache, **settings: Any) -> Method[Any]:
    torch.manual_seed(0)
    return methods.build(name, student=tiny_model(**TINY_VIT_ARGS), cache=cache, settings=settings)


def features(seed: int = 0, *, channels: int = 32) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {name: {"grid": torch.randn(3, 16, channels, generator=generator)} for name in FEATURES}


def outputs_of(seed: int = 1) -> dict[str, Tensor]:
    return {name: tokens_to_map(value["grid"], (4, 4)) for name, value in features(seed).items()}


# --- vitkd ---


def vitkd_golden() -> tuple[dict[str, Any], ViTKDLoss, dict[str, Tensor]]:
    arrays = load_golden("vitkd_align_unitweights")
    loss = ViTKDLoss(arrays["low_s"].shape[-1], arrays["low_t"].shape[-1]).double()
    loss.load_state_dict({name[2:]: torch.tensor(array) for name, array in arrays.items() if name.startswith("p.")})
    inputs = {name: torch.tensor(arrays[name], dtype=torch.float64) for name in ("low_s", "high_s", "low_t", "high_t", "noise")}
    for name in ("low_s", "high_s"):
        inputs[name].requires_grad_()
    return arrays, loss, inputs


def test_vitkd_and_its_gradients_equal_the_authors() -> None:
    arrays, loss, x = vitkd_golden()
    ratio = float(arrays["lambda_"])
    shallow = loss.shallow(x["low_s"].unbind(1), x["low_t"].unbind(1))
    deep = loss.deep(x["high_s"], x["high_t"], x["noise"], grid=(4, 4), mask_ratio=ratio)
    assert shallow.item() == pytest.approx(float(arrays["loss_mimic"]), rel=1e-5)
    assert deep.item() == pytest.approx(float(arrays["loss_gen"]), rel=1e-5)
    (shallow + deep).backward()
    for name in ("low_s", "high_s"):
        np.testing.assert_allclose(x[name].grad, arrays[f"grad_{name}"], rtol=1e-5, atol=1e-8)
    for name, parameter in loss.named_parameters():
        np.testing.assert_allclose(parameter.grad, arrays[f"g.{name}"], rtol=1e-5, atol=1e-8, err_msg=name)


@given(st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_the_generation_loss_of_vitkd_is_blind_to_the_teachers_unmasked_tokens_and_the_students_masked_ones(seed: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    loss = ViTKDLoss(5, 7).double()
    high_s, high_t = (torch.randn(2, 9, channels, generator=generator, dtype=torch.float64) for channels in (5, 7))
    noise = torch.rand(2, 9, generator=generator)
    masked = (noise.argsort(1).argsort(1) >= int(9 * (1 - ratio))).unsqueeze(2)
    assert masked.any(dim=1).all()

    def deep(s: Tensor, t: Tensor) -> float:
        return loss.deep(s, t, noise, grid=(3, 3), mask_ratio=ratio).item()

    expected = deep(high_s, high_t)
    assert deep(high_s, high_t + ~masked * torch.randn(high_t.shape)) == pytest.approx(expected, rel=1e-12)
    assert deep(high_s + masked * torch.randn(high_s.shape), high_t) == pytest.approx(expected, rel=1e-12)
    assert deep(high_s, high_t + masked) != pytest.approx(expected, rel=1e-12)
    if not masked.all():
        assert deep(high_s + ~masked, high_t) != pytest.approx(expected, rel=1e-12)


def test_vitkd_of_a_cached_batch_is_the_golden_formula_on_the_teachers_grid(cache: Cache) -> None:
    torch.manual_seed(0)
    method = methods.build(
        "vitkd", student=tiny_model(**TINY_VIT_ARGS | STUDENT_ARGS), cache=cache, settings={"alpha": 2.0, "beta": 3.0, "mask_ratio": 0.25}
    )
    noise = copy.deepcopy(method.noise)
    images, targets = torch.randn(3, 3, 32, 32), features()
    outputs = method.run_student(images)
    assert outputs["features@norm"].shape == (3, 24, 2, 2)
    parts = method.losses(outputs, torch.zeros(3, dtype=torch.int64), targets)
    tokens = {
        name: map_to_tokens(F.interpolate(outputs[name], size=(4, 4), mode="bilinear", antialias=True, align_corners=False)) for name in FEATURES
    }
    low = [tokens[name] for name in FEATURES[:2]]
    torch.testing.assert_close(parts["shallow"], 2.0 * method.loss.shallow(low, [targets[name]["grid"] for name in FEATURES[:2]]))
    deep = method.loss.deep(tokens["features@norm"], targets["features@norm"]["grid"], noise(3, 16, like=images), grid=(4, 4), mask_ratio=0.25)
    torch.testing.assert_close(parts["deep"], 3.0 * deep)
    again = method.losses(outputs, torch.zeros(3, dtype=torch.int64), targets)
    assert not torch.equal(again["deep"], parts["deep"])  # other tokens are masked in every step


def test_vitkd_of_equal_widths_has_no_adapters(cache: Cache) -> None:
    assert not [name for name in build("vitkd", cache).state_dict() if "align" in name]
    other = tiny_model(**TINY_VIT_ARGS | STUDENT_ARGS)
    assert [name for name in methods.build("vitkd", student=other, cache=cache).state_dict() if "align" in name]


def test_a_resumed_run_repeats_the_masks_to_the_bit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**overrides: Any) -> TrainConfig:
        options: dict[str, Any] = {
            "cache": str(folder / "cache"), "students": (TINY_VIT,), "method": "nkd+vitkd+mgd", "model_kwargs": STUDENT_ARGS, "out": str(tmp_path / "a"),
            "epochs": 4, "batch_size": 2, "workers": 0, "device": "cpu",
        }  # fmt: skip
        return TrainConfig(**{**options, **overrides})

    (whole,) = train(config())
    (other,) = train(config(seed=43, out=str(tmp_path / "c")))
    save = pipelines.training.checkpoints.save_checkpoint

    def save_and_die(path: Path, state: dict[str, Any], **more: Any) -> None:
        save(path, state, **more)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.training.checkpoints, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(config(out=str(tmp_path / "b")))
    monkeypatch.setattr(pipelines.training.checkpoints, "save_checkpoint", save)
    torch.manual_seed(99)
    (resumed,) = train(config(out=str(tmp_path / "b"), resume=True))
    assert_same_state(state_of(resumed), state_of(whole))
    key = "terms.vitkd.noise._extra_state"
    assert torch.equal(state_of(resumed)["method"][key], state_of(whole)["method"][key])
    assert not torch.equal(state_of(other)["method"][key], state_of(whole)["method"][key])  # the run's seed decides the masks


def test_noise_is_a_function_of_its_state_alone() -> None:
    torch.manual_seed(3)
    noise, rest = Noise(), torch.rand(2)
    torch.manual_seed(3)
    state = noise.state_dict()
    first = noise(4, 5, like=rest)
    assert first.shape == (4, 5)
    assert first.min() >= 0 and first.max() < 1
    other = Noise()
    assert torch.equal(torch.rand(2), rest)  # drawing noise leaves torch's own generator alone
    other.load_state_dict(state)
    assert torch.equal(other(4, 5, like=rest), first)
    assert not torch.equal(other(4, 5, like=rest), first)


# --- mimic and frequency ---


def test_mimic_is_the_mean_squared_error_of_the_adapted_map(cache: Cache) -> None:
    method, targets, outputs = build("mimic", cache), features(), outputs_of()
    found = method.losses(outputs, torch.zeros(3, dtype=torch.int64), targets)["mimic"]
    expected = F.mse_loss(method.adapter(map_to_tokens(outputs["features@norm"])), targets["features@norm"]["grid"])
    torch.testing.assert_close(found, expected)


def frequency(cache: Cache, bands: tuple[str, ...], targets: Mapping[str, Mapping[str, Tensor]], outputs: Mapping[str, Tensor]) -> Tensor:
    return build("frequency", cache, bands=bands).losses(outputs, torch.zeros(3, dtype=torch.int64), targets)["frequency"]


def test_frequency_of_all_bands_is_mimic_and_its_bands_add_up(cache: Cache) -> None:
    targets, outputs = features(), outputs_of()
    spatial = build("mimic", cache).losses(outputs, torch.zeros(3, dtype=torch.int64), targets)["mimic"]
    every = frequency(cache, BANDS, targets, outputs)
    torch.testing.assert_close(every, spatial)
    each = [frequency(cache, (band,), targets, outputs) for band in BANDS]
    assert all(part > 0 for part in each)
    torch.testing.assert_close(torch.stack(each).sum(), spatial)
    torch.testing.assert_close(frequency(cache, ("low", "high"), targets, outputs), each[1] + each[3])


def test_frequency_is_blind_to_dc_unless_asked(cache: Cache) -> None:
    targets, outputs = features(), outputs_of()
    moved = {name: {"grid": value["grid"] + torch.arange(32.0)} for name, value in targets.items()}  # a constant a channel
    without, with_dc = ("low", "mid", "high"), BANDS
    torch.testing.assert_close(frequency(cache, without, moved, outputs), frequency(cache, without, targets, outputs))
    assert frequency(cache, with_dc, moved, outputs) > 2 * frequency(cache, with_dc, targets, outputs)
    assert methods.parse_settings("frequency").bands == without


@pytest.mark.parametrize("size", [7, 14, 16])
def test_the_dct_is_scalekds_made_orthonormal(size: int) -> None:
    arrays = load_golden("scalekd_dct")
    x, theirs = torch.tensor(arrays[f"x{size}"], dtype=torch.float64), torch.tensor(arrays[f"dct{size}"])
    ours = dct2(x)
    scale = torch.full((size,), (2 / size) ** 0.5 / 2, dtype=torch.float64)  # theirs has 2·cos and no norm
    scale[0] *= 0.5**0.5
    torch.testing.assert_close(ours, theirs * scale[:, None] * scale[None, :], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours.square().sum(), x.square().sum())
    no_dc = torch.tensor(arrays[f"idct_nodc{size}"])
    kept = torch.where(band_mask((size, size), ("low", "mid", "high")), ours, 0.0)
    torch.testing.assert_close(kept, dct2(no_dc), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 9))
def test_every_coefficient_is_in_one_band(rows: int, columns: int) -> None:
    counts = torch.stack([band_mask((rows, columns), (band,)) for band in BANDS]).sum(dim=0)
    assert counts.unique().tolist() == [1]
    assert band_mask((rows, columns), ("dc",)).nonzero().tolist() == [[0, 0]]


@example((3, 1, 2, 1))
@given(st.tuples(*[st.integers(1, 9)] * 4))
def test_resizing_is_torchs_bilinear_with_antialias(sides: tuple[int, int, int, int]) -> None:
    x = torch.randn(2, 3, *sides[:2], dtype=torch.float64)
    turned = x.mT if sides[3] == 1 else x  # torch's own maps of one column are wrong: all its values are the first
    expected = F.interpolate(turned, size=sides[:1:-1] if sides[3] == 1 else sides[2:], mode="bilinear", antialias=True, align_corners=False)
    expected = expected.mT if sides[3] == 1 else expected
    torch.testing.assert_close(resize_map(x, sides[2:]), expected)
    torch.testing.assert_close(resize_map(torch.ones_like(x), sides[2:]), torch.ones_like(expected))
    assert resize_map(x, (sides[0], sides[1])) is x


# --- mgd and uskd ---


def test_mgd_is_its_formula_written_out(cache: Cache) -> None:
    method, targets, outputs = build("mgd", cache, mask_ratio=0.4), features(), outputs_of()
    noise = copy.deepcopy(method.noise)
    found = method.losses(outputs, torch.zeros(3, dtype=torch.int64), targets)["generated"]
    visible = (noise(3, 32, 1, 1, like=found) >= 0.4).float()
    assert 0 < visible.mean() < 1
    generated = method.generation(outputs["features@norm"] * visible)
    expected = 7e-5 * F.mse_loss(generated, tokens_to_map(targets["features@norm"]["grid"], (4, 4)), reduction="sum") / 3
    torch.testing.assert_close(found, expected)


def test_uskd_is_its_formula_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    s, w = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 5, 2, 2])
    target, other, weak = uskd_parts(s, w, labels)
    p, log_p, q = s.softmax(1), s.log_softmax(1), w.softmax(1)
    at = p[range(4), labels]
    expected_target, expected_other, expected_weak = [], [], []
    for row, label in enumerate(labels.tolist()):
        expected_target.append(-(at[row] ** 2 + 1 - (at**2).mean()) * log_p[row, label])
        score = q[row] / (1 - q[row, label] + 1e-6) + log_p[row] / (1 - log_p[row, label] + 1e-6)
        order = sorted(range(6), key=lambda c: -float(score[c]))
        zipf = torch.tensor([1 / (1 + order.index(c)) for c in range(6) if c != label], dtype=torch.float64)
        beside = [c for c in range(6) if c != label]
        expected_other.append(-(zipf / zipf.sum() * s[row, beside].log_softmax(0)).sum())
        expected_weak.append(F.cross_entropy(w[row], labels[row], label_smoothing=0.1))
    for found, values in ((target, expected_target), (other, expected_other), (weak, expected_weak)):
        torch.testing.assert_close(found, torch.stack(values).mean())


def test_uskd_takes_the_two_largest_of_soft_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    s, w = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    soft = torch.tensor([[0.7, 0.0, 0.3, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    target, other, weak = uskd_parts(s, w, soft)
    p, log_p = s.softmax(1), s.log_softmax(1)
    first = [p[0, 0] ** 2, p[0, 2] ** 2]
    second = [p[1, 1] ** 2, p[1, 0] ** 2]  # the second largest of a one-hot label is its first zero, whose value is 0
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    expected = -((first[0] + 0.7 - means[0]) * log_p[0, 0] + (first[1] + 0.3 - means[1]) * log_p[0, 2] + (second[0] + 1 - means[0]) * log_p[1, 1])
    torch.testing.assert_close(target, expected / 2)
    torch.testing.assert_close(weak, F.cross_entropy(w, soft, label_smoothing=0.1))
    q = w.softmax(1)
    expected_other = []
    for row, labels in enumerate(([0, 2], [1])):
        score = q[row] / (1 - q[row, labels].sum() + 1e-6) + log_p[row] / (1 - log_p[row, labels].sum() + 1e-6)
        order = score.argsort(descending=True).tolist()
        beside = [c for c in range(5) if c not in labels]
        zipf = torch.tensor([1 / (1 + order.index(c)) for c in beside], dtype=torch.float64)
        expected_other.append(-(zipf / zipf.sum() * s[row, beside].log_softmax(0)).sum())
    torch.testing.assert_close(other, torch.stack(expected_other).mean())


@pytest.mark.parametrize("num_classes", [2, 3, 6])
def test_uskd_of_a_one_hot_soft_label_is_that_of_the_hard_one(num_classes: int) -> None:
    s, w = (torch.randn(4, num_classes, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(4) % num_classes
    torch.testing.assert_close(uskd_parts(s, w, F.one_hot(labels, num_classes).double()), uskd_parts(s, w, labels))


def test_uskd_is_finite_where_both_of_two_classes_are_labels() -> None:
    s, w = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    parts = torch.stack(uskd_parts(s, w, torch.tensor([[0.3, 0.7], [0.5, 0.5], [1.0, 0.0]])))
    parts.sum().backward()
    assert parts.isfinite().all()
    assert s.grad is not None
    assert s.grad.isfinite().all()


# --- students ---

FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "vit": (TINY_VIT, {**TINY_VIT_ARGS, "depth": 3}, "blocks.1", "blocks.0"),
    "vit, averaged": (TINY_VIT, {**TINY_VIT_ARGS, "depth": 3, "global_pool": "avg", "class_token": False}, "blocks.-1", "blocks.0"),
    "deit": ("deit_tiny_distilled_patch16_224", {**TINY_VIT_ARGS, "depth": 3}, "blocks.1", "blocks.0"),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {**TINY_VIT_ARGS, "depth": 3}, "blocks.1", "blocks.0"),
    "cnn": ("resnet18", {"channels": [4, 4, 8, 8], "stem_width": 4}, "layer3", "layer3"),
    "mixer": ("mixer_s32_224", {"img_size": 64}, "blocks.1", "blocks.3"),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, "stages.2", "stages.2"),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
        "layers.2",
        "layers.2",
    ),
}


def make_student(family: str) -> tuple[nn.Module, int]:
    name, arguments, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    rates = {"drop_rate": 0.1, "drop_path_rate": 0.2}
    model = perturb(timm.create_model(name, **{**arguments, **rates, "num_classes": 10}))
    return model.train(), input_size_for(model, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_come_from_the_pass_that_gives_the_models_own_logits(family: str) -> None:
    model, size = make_student(family)
    node = FAMILIES[family][2]
    maps = StudentFeatures(model, [node, "norm"], view_size=32)
    assert all(module.training for module in model.modules())  # as they were
    images = torch.randn(4, 3, size, size)
    for training in (False, True):
        model.train(training)
        alone, together = copy.deepcopy(model), copy.deepcopy(model)
        torch.manual_seed(1)
        expected = alone(images)
        calls: list[int] = []
        next(together.children()).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        outputs = maps(together, images)
        assert len(calls) == 1
        assert torch.equal(outputs["logits"], expected)
        assert all(torch.equal(a, b) for a, b in zip(alone.buffers(), together.buffers(), strict=True))  # running statistics too
        for name in (node, "norm"):
            assert outputs[f"features@{name}"].shape[:2] == (4, maps.channels[name])
            assert outputs[f"features@{name}"].ndim == 4
            prefix = outputs.get(f"features@{name}.prefix")
            assert (prefix.shape[1] if prefix is not None else 0) == getattr(model, "num_prefix_tokens", 0)
    model.eval()
    value = maps(model, images)["features@norm"]
    raw = model.forward_features(images)
    expected_map = {3: lambda: tokens_to_map(raw[:, getattr(model, "num_prefix_tokens", 0) :], value.shape[2:]), 4: lambda: raw}[raw.ndim]()
    torch.testing.assert_close(value, expected_map.permute(0, 3, 1, 2) if family == "swin" else expected_map)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_student_mimics_generates_and_teaches_itself(family: str, cache: Cache) -> None:
    model, size = make_student(family)
    assert middle_node(model) == FAMILIES[family][3]
    method = methods.build("mimic+mgd+frequency+uskd", student=model, cache=cache, settings={"mimic.student_node": FAMILIES[family][2]})
    parts = method(torch.randn(3, 3, size, size), torch.tensor([0, 1, 9]), features())
    torch.stack(list(parts.values())).sum().backward()
    unused = {name for name, parameter in method.named_parameters() if parameter.grad is None}
    assert unused <= {"student.head_dist.weight", "student.head_dist.bias", "student.mask_token"}


@pytest.mark.parametrize("name", ["tresnet_m", "efficientnet_b0"])  # the one's intermediates begin with its input, the other's skip blocks
def test_a_map_is_the_one_of_its_node_where_indices_and_nodes_differ(name: str) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    nodes = list_nodes(model)[:-1]
    maps = StudentFeatures(model, nodes, view_size=32)
    with torch.no_grad(), capture(model, nodes) as captured:
        outputs = maps(model, torch.randn(1, 3, 32, 32))
    for node in nodes:
        assert torch.equal(outputs[f"features@{node}"], captured[node])


def test_a_student_built_for_the_views_is_given_them_in_that_size() -> None:
    for name in ("coatnet_pico_rw_224", "mixer_s32_224"):
        student = build_student(name, num_classes=10, view_size=64)
        assert (student.input_size, input_size_for(student.model, 64)) == (64, 64)
        assert StudentFeatures(student.model, ["norm"], view_size=64).channels["norm"] > 0


def test_a_student_whose_maps_change_its_logits_is_refused() -> None:
    model = tiny_model()
    forward = model.forward_intermediates
    model.forward_intermediates = lambda *args, **kwargs: (forward(*args, **kwargs)[0] * 1.001, forward(*args, **kwargs)[1])
    with pytest.raises(StudentError, match="its logits differ when its maps are taken in the same pass"):
        StudentFeatures(model, ["blocks.0"], view_size=32)
    assert StudentFeatures(model, ["norm"], view_size=32).channels == {"norm": 32}


def test_a_student_without_intermediates_has_its_last_map_only() -> None:
    class Plain(nn.Module):
        num_classes, num_prefix_tokens = 3, 0

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4))
            self.head = nn.Linear(5, 3)

        def forward_features(self, x: Tensor) -> Tensor:
            return self.blocks(x)

        def forward_head(self, x: Tensor) -> Tensor:
            return self.head(x.mean(dim=(2, 3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.forward_head(self.forward_features(x))

    assert StudentFeatures(Plain(), ["norm"], view_size=32).channels == {"norm": 5}
    with pytest.raises(StudentError, match=r"forward_intermediates gives no map of node 'blocks\.0'; choose 'norm'"):
        StudentFeatures(Plain(), ["blocks.0"], view_size=32)
    with pytest.raises(StudentError, match="no forward_features and forward_head"):
        StudentFeatures(nn.Linear(2, 2), ["norm"], view_size=32)


def test_vitkd_refuses_a_student_whose_width_changes(cache: Cache) -> None:
    class Pyramid(nn.Module):
        num_classes = 10
        feature_info: tuple[dict[str, Any], ...] = tuple({"module": f"blocks.{i}"} for i in range(2))

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.Conv2d(5, 7, 2, stride=2))
            self.head = nn.Linear(7, 10)

        def forward_intermediates(self, x: Tensor, indices: Any, norm: bool, output_fmt: str) -> tuple[Tensor, list[Tensor]]:
            first = self.blocks[0](x)
            second = self.blocks[1](first)
            return second, [[first, second][i] for i in indices]

        def forward_features(self, x: Tensor) -> Tensor:
            return self.blocks(x)

        def forward_head(self, x: Tensor) -> Tensor:
            return self.head(x.mean(dim=(2, 3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.forward_head(self.forward_features(x))

    with pytest.raises(UsageError, match=r"'vitkd' is for plain ViTs.*found channels \[5, 7, 7\]"):
        methods.build("vitkd", student=Pyramid(), cache=cache)
