"""ScaleKD's parts against what the authors' code computes, and the method trained from a cache with the teacher's tail alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import STUDENTS, SWIN, SWIN_ARGS, load_golden, make_shards, save_local_dir, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcache import methods
from kdcache.cache import Cache
from kdcache.dual_view import frequency_loss, spatial_loss, without_mean
from kdcache.encodings import TargetShape, build_encoding
from kdcache.errors import MissingError, StudentError, UsageError
from kdcache.feature_maps import dct2, map_to_tokens, tokens_to_map
from kdcache.losses import soft_cross_entropy
from kdcache.methods.scalekd import PRESETS, ScaleKD, ScaleKDSettings, split_tail, stage_3_of
from kdcache.nodes import intermediate_indices, to_tokens
from kdcache.opening import open_cache
from kdcache.projector import ChannelNorm, CrossAttentionProjector
from kdcache.students import build_student
from kdcache.teacher import load_teacher
from kdcache.teacher_card import TeacherCard
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train
from pipelines.training.loop import make_optimizer

PROJECTOR_NAMES = {
    "pos_embed": "position", "proj_pos.0": "query_in", "proj_student.0": "convolution", "proj_student.1": "norm", "pos_attention.q": "query",
    "pos_attention.k": "key", "pos_attention.v": "value", "pos_attention.proj": "out", "ffn.layers.0.0": "mlp.0", "ffn.layers.1": "mlp.2",
    "norm": "out_norm", "query": "queries",
}  # fmt: skip
"""The originals' names of modules and parameters → ours."""


# --- projector ---


def projector_of(arrays: dict[str, Any]) -> CrossAttentionProjector:
    """The golden's projector, float64."""
    state = {}
    for name, array in arrays.items():
        if name.startswith("p."):
            module, _, leaf = name[2:].rpartition(".")
            tensor = torch.tensor(array).double() if array.dtype.kind == "f" else torch.tensor(array)
            if module == "proj_pos.0" and leaf == "weight":
                tensor = tensor[:, :, 0, 0]  # a 1×1 convolution
            state[PROJECTOR_NAMES[module or leaf] + ("" if module in ("", "query") else f".{leaf}")] = tensor
    queries = state.get("queries")
    projector = CrossAttentionProjector(
        arrays["x"].shape[1], arrays["y"].shape[2], grid=arrays["x"].shape[2:], num_queries=None if queries is None else len(queries),
        num_heads=int(arrays["num_heads"]), softmax_scale=float(arrays["softmax_scale"]),
    ).double()  # fmt: skip
    projector.load_state_dict(state)
    return projector.train(bool(arrays["bn_train"]))


@pytest.mark.parametrize("case", ["scalekd_cap_learnedq_bntrain", "scalekd_cap_extq"])
def test_the_projector_and_its_gradients_equal_the_authors(case: str) -> None:
    arrays = load_golden(case)
    projector = projector_of(arrays)
    x = torch.tensor(arrays["x"], dtype=torch.float64, requires_grad=True)
    query = torch.tensor(arrays["query"], dtype=torch.float64, requires_grad=True) if "query" in arrays else None
    y = projector(x, query)
    np.testing.assert_allclose(y.detach(), arrays["y"], rtol=1e-5, atol=1e-8)
    (y * torch.tensor(arrays["cotangent"])).sum().backward()
    np.testing.assert_allclose(x.grad, arrays["grad_x"], rtol=1e-5, atol=1e-7)
    if query is not None:
        np.testing.assert_allclose(query.grad, arrays["grad_query"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_projector_is_its_formula_written_out(norm: Any) -> None:
    torch.manual_seed(0)
    projector = CrossAttentionProjector(6, 12, grid=(2, 3), num_queries=5, num_heads=3, softmax_scale=0.2, norm=norm).double()
    assert isinstance(projector.norm, ChannelNorm) == (norm == "layer")
    for parameter in projector.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(4, 6, 2, 3, dtype=torch.float64)
    z = projector.convolution(x)
    axes = (0, 2, 3) if norm == "batch" else (1,)
    z = (z - z.mean(axes, keepdim=True)) / (z.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()
    z = F.relu(z * projector.norm.weight.view(-1, 1, 1) + projector.norm.bias.view(-1, 1, 1)) + projector.position
    kv = z.permute(0, 2, 3, 1).flatten(1, 2)
    q = projector.query(F.relu(projector.query_in(projector.queries))).expand(4, -1, -1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[..., part] @ projector.key(kv)[..., part].transpose(1, 2) * 4**-0.5 * 0.2).softmax(-1)
        heads.append(weights @ projector.value(kv)[..., part])
    y = F.layer_norm(projector.out(torch.cat(heads, -1)), (12,), projector.out_norm.weight, projector.out_norm.bias, 1e-5)
    torch.testing.assert_close(projector(x), y + projector.mlp[2](F.relu(projector.mlp[0](y))))


def test_queries_that_are_handed_in_win() -> None:
    torch.manual_seed(0)
    projector = CrossAttentionProjector(4, 8, grid=(2, 2), num_queries=3, num_heads=2).eval()
    x, query = torch.randn(2, 4, 2, 2), torch.randn(2, 3, 8)
    assert not torch.equal(projector(x, query), projector(x))
    torch.testing.assert_close(projector(x, projector.queries.expand(2, -1, -1)), projector(x))
    with pytest.raises(ValueError, match="expected queries"):
        CrossAttentionProjector(4, 8, grid=(2, 2), num_queries=None, num_heads=2)(x)
    with pytest.raises(UsageError, match="3 attention heads do not divide the teacher's 8 channels"):
        CrossAttentionProjector(4, 8, grid=(2, 2), num_queries=3, num_heads=3)


# --- dual view ---


def test_the_dual_view_losses_and_their_gradients_equal_the_authors() -> None:
    arrays = load_golden("scalekd_dfm_7x7")
    teacher = map_to_tokens(torch.tensor(arrays["t"], dtype=torch.float64))
    for name, alpha, loss in (("spat", arrays["alpha"][0], spatial_loss), ("freq", arrays["alpha"][1], frequency_loss)):
        student = torch.tensor(arrays["s"], dtype=torch.float64, requires_grad=True)
        value = alpha * loss(student, teacher)
        value.backward()
        assert value.item() == pytest.approx(float(arrays[f"loss_{name}"]), rel=1e-5)
        np.testing.assert_allclose(student.grad, arrays[f"grad_{name}"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("size", [7, 14, 16])
def test_the_frequency_view_is_the_map_without_its_mean(size: int) -> None:
    arrays = load_golden("scalekd_dct")
    x = torch.tensor(arrays[f"x{size}"], dtype=torch.float64)
    np.testing.assert_allclose(tokens_to_map(without_mean(map_to_tokens(x)), (size, size)), arrays[f"idct_nodc{size}"], atol=1e-6)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 5))
def test_the_frequency_view_is_the_map_from_its_bands_without_dc(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (3 + torch.randn(2, rows * columns, 6, generator=generator) for _ in range(2))
    encoding = build_encoding("features", "dct", TargetShape(grid=(rows, columns), channels=6, prefix_tokens=0))
    encoding.load_calibration({"grid_mean": teacher.mean((0, 1)), "grid_std": teacher.std((0, 1)) + 0.1})
    components = encoding.encode({"grid": teacher})
    whole = encoding.decode(components)["grid"]
    bands = encoding.decode({name: value for name, value in components.items() if not name.startswith("dc")})["grid"]
    torch.testing.assert_close(bands, without_mean(whole), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frequency_loss(student, bands), frequency_loss(student, whole), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(frequency_loss(student, whole), frequency_loss(student, teacher), rtol=0.1, atol=0.02)
    assert dct2(tokens_to_map(bands, (rows, columns)))[..., 0, 0].abs().max() < 1e-3


def test_the_spatial_view_is_blind_to_length_and_the_frequency_view_to_the_mean() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 5), torch.randn(2, 9, 5)
    torch.testing.assert_close(spatial_loss(7 * student, teacher), spatial_loss(student, teacher))
    assert spatial_loss(student + 1, teacher) != spatial_loss(student, teacher)
    torch.testing.assert_close(frequency_loss(student + torch.randn(5), teacher), frequency_loss(student, teacher))
    zero: Tensor = frequency_loss(torch.zeros(2, 9, 5), torch.zeros(2, 9, 5))
    assert zero == 0


# --- the method ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of 8 images, teacher/ (a Swin of 64 channels at stage 3, 128 at stage 4) and cache/, by `extract --for scalekd` alone."""
    folder = tmp_path_factory.mktemp("scalekd")
    make_shards(folder / "shards", num_shards=1, num_samples=8)
    save_local_dir(tiny_model(SWIN, **SWIN_ARGS), folder / "teacher", SWIN_ARGS)
    config = ExtractConfig(
        shards=str(folder / "shards"), cache=str(folder / "cache"), teacher=f"local-dir:{folder / 'teacher'}", methods=("scalekd",), views=1, workers=0
    )  # fmt: skip
    extract(config)
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return open_cache(folder / "cache")


def student_of(family: str) -> nn.Module:
    name, args, _ = STUDENTS[family]
    return build_student(name, num_classes=10, view_size=64, model_args=args).model


def build(cache: Cache, family: str = "cnn", **settings: Any) -> ScaleKD:
    torch.manual_seed(0)
    method = methods.build("scalekd", student=student_of(family), cache=cache, settings=settings)
    assert isinstance(method, ScaleKD)
    return method


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    images, grid, logits = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((3, 3, 64, 64), (3, 16, 128), (3, 10)))
    return images, torch.tensor([1, 2, 3]), {"features@norm": {"grid": grid}, "logits": {"logits": logits}}


def test_the_whole_loss_is_its_formula_written_out(folder: Path, cache: Cache) -> None:
    """The tail is the teacher's own modules here, and every constant another."""
    constants: dict[str, Any] = {
        "alpha_s3": (0.3, 0.5),
        "alpha_s4": (0.7, 1.1),
        "softmax_scale": (2.0, 3.0),
        "heads_s3": 4,
        "heads_s4": 2,
        "kd_alpha": 0.2,
    }
    method = build(cache, **constants, temperature=2.0, smoothing=0.0, projector_norm="layer").double()
    images, labels, targets = batch(torch.float64)
    teacher = load_teacher(f"local-dir:{folder / 'teacher'}").model.double()
    outputs = method.run_student(images)
    s3, s4 = (outputs[f"features@{node}"] for node in ("layer3", "norm"))
    target = tokens_to_map(targets["features@norm"]["grid"], (4, 4))

    def view_loss(tokens: Tensor, frequency: bool) -> Tensor:
        maps = [tokens_to_map(tokens, (4, 4)), target]
        maps = [one - one.mean((2, 3), keepdim=True) for one in maps] if frequency else maps
        student, wanted = (F.normalize(one, dim=1) for one in maps)
        return F.mse_loss(student, wanted, reduction="sum") / 3

    expected: dict[str, Tensor] = {}
    for i, view in enumerate(("spatial", "frequency")):
        scales = [method.projectors[f"{stage}_{view}"].scale for stage in ("s3", "s4")]
        assert scales == [16**-0.5 * (2.0, 3.0)[i], 64**-0.5 * (2.0, 3.0)[i]]
        queries = method.projectors[f"s3_{view}"](s3)
        assert queries.shape == (3, 64, 64)
        passed = teacher.norm(teacher.layers[3](queries.view(3, 8, 8, 64))).flatten(1, 2)
        expected[f"s3_{view}"] = (0.3, 0.5)[i] * view_loss(passed, view == "frequency")
        expected[f"s4_{view}"] = (0.7, 1.1)[i] * view_loss(method.projectors[f"s4_{view}"](s4, passed), view == "frequency")
    p = F.softmax(targets["logits"]["logits"] / 2, 1)
    expected["logits"] = -0.2 * 4 * (p * F.log_softmax(outputs["logits"] / 2, 1)).sum(1).mean()
    expected["task"] = 0.8 * F.cross_entropy(outputs["logits"], labels)
    found = method(images, labels, targets)
    assert list(found) == list(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
    sum(found.values()).backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    method.zero_grad()
    expected_loss = method.losses(outputs, labels, targets)["s4_spatial"]  # stage 4 reaches stage 3's projector: its queries are not detached
    expected_loss.backward()
    assert method.projectors["s3_spatial"].queries.grad.abs().sum() > 0
    assert not any("tail" in name for name in method.state_dict()) and not method.tail.training
    assert method.train().tail.model.layers[3].training is False


def test_the_logits_loss_equals_the_authors() -> None:
    arrays = load_golden("kd_clskd_scalekd")
    names = [name for name in arrays if re.fullmatch(r"clskd_T[0-9.]+_a[0-9.]+", name)]
    assert names
    for name in names:
        temperature, alpha = (float(part) for part in name.removeprefix("clskd_T").split("_a"))
        student = torch.tensor(arrays["logit_s"], dtype=torch.float64, requires_grad=True)
        loss = alpha * soft_cross_entropy(student, torch.tensor(arrays["logit_t"], dtype=torch.float64), temperature=temperature)
        loss.backward()
        assert loss.item() == pytest.approx(float(arrays[name]), rel=1e-5)
        np.testing.assert_allclose(student.grad, arrays[f"{name}.grad"], rtol=1e-5, atol=1e-8)
        assert ScaleKDSettings(kd_alpha=alpha).weights[1] == pytest.approx(float(arrays[f"{name}.ce_weight"]))


@pytest.mark.parametrize("family", STUDENTS)
def test_stage_3_and_4_of_every_family_are_found(family: str, cache: Cache) -> None:
    method = build(cache, family)
    assert method.student_nodes() == STUDENTS[family][2]
    parts = method(*batch())
    assert set(parts) == {"s3_spatial", "s3_frequency", "s4_spatial", "s4_frequency", "logits", "task"}
    assert all(part.isfinite() for part in parts.values())


def test_stage_3_of_a_vit_is_block_8_of_12() -> None:
    assert [stage_3_of(tiny_model("vit_tiny_patch16_224", img_size=32, depth=depth)) for depth in (12, 24)] == ["blocks.8", "blocks.17"]


def test_logits_may_come_from_the_head_in_the_tail(cache: Cache) -> None:
    method = build(cache, logits="head")
    assert method.target_names == ("features@norm",)
    shard, key = "train-0000", "s0003"
    row = cache.read(shard, key)
    logits = method._teacher_logits({"features@norm": {"grid": torch.tensor(row["features@norm"])[None]}})
    assert np.linalg.norm(logits[0].numpy() - row["logits"]) < 0.05 * np.linalg.norm(row["logits"])  # both were quantised
    images, labels, targets = batch()
    with_logits = targets | {"logits": {"logits": method._teacher_logits(targets)}}
    torch.testing.assert_close(method.eval()(images, labels, targets)["logits"], build(cache).eval()(images, labels, with_logits)["logits"])
    other = build_student("resnet10t", num_classes=7, view_size=64).model
    with pytest.raises(UsageError, match="the student has 7 classes, the teacher's head 10"):
        methods.build("scalekd", student=other, cache=cache, settings={"logits": "head"})


def test_with_the_teachers_head_the_student_has_the_teachers_classes(folder: Path, tmp_path: Path) -> None:
    """Ten, though the labels of the eight images reach seven."""
    name, args, _ = STUDENTS["vit"]
    options: dict[str, Any] = {
        "students": (name,),
        "model_kwargs": args,
        "out": str(tmp_path),
        "epochs": 1,
        "batch_size": 8,
        "workers": 0,
        "device": "cpu",
    }
    for method in ("scalekd", "mimic+scalekd"):
        (run,) = train(TrainConfig(cache=str(folder / "cache"), method=method, settings={"logits": "head"}, **options))
        assert json.loads(Path(run["path"], "export", "config.json").read_text())["num_classes"] == 10


def test_a_teacher_without_a_classifier_is_told_to_leave_the_logits_out() -> None:
    headless = TeacherCard(model="vit_small_patch16_dinov3", nodes=("blocks.0", "blocks.1", "norm"), containers={"blocks": 2})
    for logits in ("cache", "head"):
        with pytest.raises(UsageError, match=r"vit_small_patch16_dinov3 has no classifier.*kd_alpha=0"):
            methods.requirements("scalekd", headless, {"logits": logits})
    assert methods.requirements("scalekd", headless, {"kd_alpha": 0}) == ["features@norm"]


def test_losses_without_weight_cost_nothing(cache: Cache) -> None:
    method = build(cache, alpha_s4=(0.5, 0.0), kd_alpha=0)
    assert list(method.projectors) == ["s3_spatial", "s4_spatial", "s3_frequency"] and method.target_names == ("features@norm",)
    assert list(method(*batch())) == ["s3_spatial", "s4_spatial", "s3_frequency", "task"]
    assert method.weights(method.settings) == (1.0, 1.0)


_SWIN_L, _EVA_L = ("swin_large_patch4_window7_224", 768, 14, 1536, 7), ("eva_large_patch14_196", 1024, 16, 1024, 16)
_SWIN_S, _BEIT_L = ("swin_small_patch4_window7_224", 384, 14, 768, 7), ("beit_large_patch16_224", 1024, 14, 1024, 14)
PAIRS: dict[tuple[tuple[str, int, int, int, int], str], tuple[str, str, tuple[int, int], tuple[int, int]]] = {
    (_SWIN_L, "resnet50"): ("swin_l-resnet50", "layer3", (1024, 14), (2048, 7)),
    (_SWIN_L, "mobilenetv1_100"): ("swin_l-mobilenet", "blocks.3", (512, 14), (1024, 7)),
    (_SWIN_L, "vit_small_patch16_224"): ("swin_l-vit_s", "blocks.8", (384, 14), (384, 14)),
    (_SWIN_L, "vit_base_patch16_224"): ("swin_l-vit_b", "blocks.8", (768, 14), (768, 14)),
    (_SWIN_L, "mixer_s16_224"): ("swin_l-mixer_s", "blocks.5", (512, 14), (512, 14)),
    (_SWIN_L, "mixer_b16_224"): ("swin_l-mixer_b", "blocks.8", (768, 14), (768, 14)),
    (_SWIN_L, "convnext_tiny"): ("swin_l-convnext_t", "stages.2", (384, 14), (768, 7)),
    (_SWIN_L, "swin_tiny_patch4_window7_224"): ("swin_l-swin_t", "layers.2", (384, 14), (768, 7)),
    (_SWIN_S, "resnet50d"): ("swin_s-resnet50", "layer3", (1024, 14), (2048, 7)),
    (_EVA_L, "resnet50"): ("eva_l-resnet50", "layer3", (1024, 14), (2048, 7)),
    (_BEIT_L, "vit_base_patch16_224"): ("eva_l-vit_b", "blocks.8", (768, 14), (768, 14)),
    (_EVA_L, "mixer_b16_224"): ("eva_l-mixer_b", "blocks.8", (768, 14), (768, 14)),
}
"""(Teacher, what its tail takes: channels and grid, its final map), student → preset, stage 3, and channels and grid of stages 3 and 4, as the authors' configs."""


@pytest.mark.parametrize(("pair", "expected"), PAIRS.items(), ids=[preset for preset, *_ in PAIRS.values()])
def test_real_pairs_have_the_authors_preset_stages_and_shapes(pair: Any, expected: Any) -> None:
    """Without weights: on torch's meta device."""
    (teacher, in_channels, in_grid, out_channels, out_grid), student = pair
    preset, stage_3, *shapes = expected
    settings = ScaleKDSettings()
    settings = settings.resolve(student, teacher)
    assert settings.preset == preset
    with torch.device("meta"):
        model = timm.create_model(student)
        assert stage_3_of(model) == stage_3
        index = intermediate_indices(model)[stage_3]
        features, maps = model.forward_intermediates(torch.empty(2, 3, 224, 224), indices=[index], output_fmt="NCHW")
        value, grid = to_tokens(model, features)
        s3, s4 = maps[0], tokens_to_map(value["grid"], grid)
        assert [tuple(one.shape[1:]) for one in (s3, s4)] == [(channels, side, side) for channels, side in shapes]
        options = {"softmax_scale": settings.softmax_scale[0], "norm": settings.projector_norm}
        first = CrossAttentionProjector(s3.shape[1], in_channels, grid=s3.shape[2:], num_queries=in_grid**2, num_heads=settings.heads_s3, **options)
        second = CrossAttentionProjector(s4.shape[1], out_channels, grid=s4.shape[2:], num_queries=None, num_heads=settings.heads_s4, **options)
        assert first(s3).shape == (2, in_grid**2, in_channels)
        assert second(s4, torch.empty(2, out_grid**2, out_channels)).shape == (2, out_grid**2, out_channels)


def test_every_preset_has_a_real_pair() -> None:
    assert {preset for preset, *_ in PAIRS.values()} == PRESETS.keys() - {"general"}
    assert {name for name, preset in PRESETS.items() if preset.projector_norm == "layer"} == {"swin_l-swin_t"}


def test_presets_are_chosen_by_the_pair_and_overridden_by_what_is_given() -> None:
    def resolved(student: str, teacher: str, **given: Any) -> ScaleKDSettings:
        return ScaleKDSettings(**given).resolve(student, teacher)

    pair = resolved("resnet50", "swin_large_patch4_window7_224")
    assert (pair.alpha_s3, pair.softmax_scale, pair.heads_s3, pair.heads_s4, pair.kd_alpha) == ((0.08, 0.06), (5.0, 5.0), 16, 24, 0.5)
    small = resolved("resnet50", "swin_small_patch4_window7_224")
    assert (small.alpha_s4, small.heads_s3, small.heads_s4, small.kd_alpha, small.weights) == ((0.08, 0.0), 3, 6, 0.0, (1.0, 1.0))
    assert resolved("vit_base_patch16_224", "eva_large_patch14_196").softmax_scale == (1.0, 1.0)
    assert resolved("resnet50", "eva_large_patch14_196").softmax_scale == (0.2, 0.2)
    assert resolved("resnet18", "swin_large_patch4_window7_224").heads_s3 == 8
    assert resolved("resnet18", "x", preset="swin_l-swin_t", heads_s4=2, softmax_scale=3).model_dump(include={"heads_s3", "heads_s4", "softmax_scale", "projector_norm"}) == {
        "heads_s3": 24, "heads_s4": 2, "softmax_scale": (3.0, 3.0), "projector_norm": "layer",
    }  # fmt: skip
    assert resolved("resnet50", "swin_large", task_loss_weight=2.0, distill_loss_weight=3.0).weights == (3.0, 2.0)
    assert resolved("resnet50", "swin_large", task_loss_weight=2.0).weights == (1.0, 2.0)
    assert (resolved("resnet18", "x").preset, resolved("resnet50", "swin_large").preset) == ("general", "swin_l-resnet50")
    with pytest.raises(UsageError, match="no preset 'swin'"):
        methods.parse_settings("scalekd", {"preset": "swin"})


def test_the_tail_is_split_as_in_the_originals() -> None:
    def split(model: str, container: str, depth: int, **settings: Any) -> tuple[list[str], list[str]]:
        return split_tail(ScaleKDSettings(**settings), TeacherCard(model=model, containers={container: depth}))

    assert split("swin_large_patch4_window7_224", "layers", 4) == (["layers.3", "norm"], [])
    assert split("deit3_small_patch16_224", "blocks", 12) == (["blocks.8", "blocks.9", "blocks.10"], ["blocks.11", "norm"])
    assert split("eva_large_patch14_196", "blocks", 24) == (["blocks.22", "blocks.23", "norm"], [])
    assert split("beit_base_patch16_224", "blocks", 12) == (["blocks.10", "blocks.11", "norm"], [])
    assert split("vit_large_patch16_224", "blocks", 24, s3_blocks=3, s4_blocks=1) == (["blocks.20", "blocks.21", "blocks.22"], ["blocks.23", "norm"])
    as_n = {"s3_blocks": 2, "s4_blocks": 1, "s4_repeats": True}  # the originals' VisionTransformerN
    assert split("deit3_base_patch16_224", "blocks", 12, **as_n) == (["blocks.10", "blocks.11"], ["blocks.11", "norm"])
    with pytest.raises(UsageError, match="needs a ViT or a Swin"):
        split("resnet50", "layer4", 3)
    with pytest.raises(UsageError, match="expected at most that together"):
        split("deit3_base", "blocks", 12, s3_blocks=12, s4_blocks=1)
    with pytest.raises(UsageError, match="s4_blocks at most s3_blocks"):
        split("deit3_base", "blocks", 12, s3_blocks=1, s4_blocks=2, s4_repeats=True)
    with pytest.raises(UsageError, match="a stage of a Swin halves the grid"):
        split("swin_tiny", "layers", 4, s4_blocks=1)


def test_train_names_a_missing_tail_and_the_command_that_adds_it(folder: Path) -> None:
    options: dict[str, Any] = {"shards": str(folder / "shards"), "teacher": f"local-dir:{folder / 'teacher'}", "views": 1, "workers": 0}
    extract(ExtractConfig(cache=str(folder / "bare"), targets=("logits", "features@norm"), **options))
    with pytest.raises(
        MissingError, match=r"runs layers\.3, norm of teacher 'teacher', whose tail is not there: run 'kdcache extract .* --for scalekd'"
    ):
        build(open_cache(folder / "bare"))


def test_after_extract_with_a_preset_train_names_it_where_it_needs_more_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_swin_s = PRESETS["swin_s-resnet50"].model_copy(update={"teachers": ("swin_tiny",)})
    monkeypatch.setitem(PRESETS, "swin_s-resnet50", of_swin_s)
    options: dict[str, Any] = {"shards": str(folder / "shards"), "teacher": f"local-dir:{folder / 'teacher'}", "views": 1, "workers": 0}
    chosen = {"preset": "swin_s-resnet50"}
    extract(ExtractConfig(cache=str(folder / "without"), methods=("scalekd",), settings=chosen, **options))
    with pytest.raises(
        MissingError,
        match=r"no target 'logits'.*; what is there serves with --set preset=swin_s-resnet50, or with --set logits=head, or with .*kd_alpha=0",
    ):
        build(open_cache(folder / "without"))
    build(open_cache(folder / "without"), **chosen, heads_s3=2, heads_s4=2)


@pytest.mark.parametrize("family", ["cnn", "vit", "swin"])
def test_decay_is_kept_from_position_embeddings_of_vit_students_as_in_the_originals(cache: Cache, family: str) -> None:
    method = build(cache, family, heads_s3=2, heads_s4=2)
    optimizer = make_optimizer(method, TrainConfig(cache="", students=("x",), weight_decay=0.1))
    decayed = {id(parameter) for group in optimizer.param_groups if group["weight_decay"] > 0 for parameter in group["params"]}
    projectors = {name: id(parameter) in decayed for name, parameter in method.projectors.named_parameters()}
    assert {value for name, value in projectors.items() if name.endswith(".position")} == {family != "vit"}
    assert {value for name, value in projectors.items() if name.endswith((".queries", ".key.weight"))} == {True}
    assert {value for name, value in projectors.items() if name.endswith((".bias", "norm.weight"))} == {False}


def test_in_a_sum_the_tail_goes_along(cache: Cache) -> None:
    torch.manual_seed(0)
    method = methods.build("scalekd+kd", student=student_of("cnn"), cache=cache).double()
    assert method.settings.scalekd.heads_s3 == 8  # its preset, filled in
    parts = method(*batch(torch.float64))
    assert {"scalekd_s3_spatial", "kd_distill", "task"} <= set(parts)
    assert next(method.terms["scalekd"].tail.parameters()).dtype == torch.float64


def test_a_map_of_one_position_has_no_frequency_view(cache: Cache) -> None:
    student = build_student("resnet10t", num_classes=10, view_size=64).model
    pooled = nn.AdaptiveAvgPool2d(1)
    student.layer4.append(pooled)
    with pytest.raises(StudentError, match="map at 'norm' has one position, hence no frequency view"):
        methods.build("scalekd", student=student, cache=cache)
    method = methods.build("scalekd", student=student, cache=cache, settings={"alpha_s4": (0.08, 0.0)})
    assert method(*batch())["s4_spatial"].isfinite()
