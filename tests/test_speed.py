"""What makes a step faster changes no value: shared work of scalekd against its straightforward version, autocast, memory format."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import (
    CNN,
    CNN_ARGS,
    STUDENTS,
    SWIN_ARGS,
    Forked,
    assert_same_state,
    make_shard,
    make_shards,
    python_script,
    save_local_dir,
    state_of,
    tiny_model,
)
from safetensors.torch import load_file
from torch import Tensor

import kdcache.evaluate
import pipelines.training.checkpoints
from kdcache import methods
from kdcache.cache import Cache
from kdcache.checkpoint import save_checkpoint
from kdcache.device import autocast
from kdcache.errors import StudentError, UsageError
from kdcache.methods.scalekd import TARGET, ScaleKD
from kdcache.opening import open_cache
from kdcache.students import build_student
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scalekd_step.py"
_VIT_ARGS: dict[str, Any] = {"patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN_ARGS),
    "vit": ("vit_tiny_patch16_224", _VIT_ARGS | {"img_size": 48}),  # grids of 3 × 3, students' of 3 × 3 and 2 × 2
    "eva": ("eva02_tiny_patch14_224", _VIT_ARGS | {"img_size": 64}),
}


def load_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("scalekd_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of 6 images, val/, and for each teacher a folder and a cache, cache-<teacher>/, by `extract --for scalekd`."""
    folder = tmp_path_factory.mktemp("speed")
    make_shards(folder / "shards", num_shards=1, num_samples=6)
    make_shard(folder / "val" / "val-00.tar", num_samples=4, seed=7)
    for kind, (name, args) in TEACHERS.items():
        source = save_local_dir(tiny_model(name, **args), folder / kind, args)
        path = str(folder / f"cache-{kind}")
        extract(ExtractConfig(shards=str(folder / "shards"), cache=path, teacher=source, methods=("scalekd",), views=1, workers=0))
    return folder


def build(cache: Cache, family: str = "cnn", **settings: Any) -> ScaleKD:
    name, args, _ = STUDENTS[family]
    student = build_student(name, num_classes=10, view_size=cache.plan.size, model_args=args)
    torch.manual_seed(0)
    method = methods.build("scalekd", student=student.model, cache=cache, settings=settings)
    assert isinstance(method, ScaleKD)
    generator = torch.Generator().manual_seed(1)
    for parameter in method.projectors.parameters():  # a fresh initialisation hides errors behind its zeros and ones
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return method


def batch_for(method: ScaleKD, cache: Cache, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    size, shape = cache.plan.size, method.teacher_shapes[TARGET]
    sizes = ((3, 3, size, size), (3, shape.grid[0] * shape.grid[1], shape.channels), (3, 10))
    images, grid, logits = (torch.randn(*size, generator=generator, dtype=dtype) for size in sizes)
    return images, torch.tensor([1, 2, 3]), {TARGET: {"grid": grid}, "logits": {"logits": logits}}


# --- sharing ---


@pytest.mark.parametrize(
    ("teacher", "family", "settings"),
    [
        ("swin", "cnn", {}),
        ("swin", "vit", {"alpha_s4": (0.5, 0.0)}),
        ("swin", "cnn", {"alpha_s3": (0.0, 0.3), "alpha_s4": (0.0, 0.2), "kd_alpha": 0.0}),
        ("swin", "cnn", {"alpha_s3": (0.3, 0.0), "alpha_s4": (0.0, 0.2), "projector_norm": "layer"}),
        ("vit", "cnn", {"s3_blocks": 1, "s4_blocks": 1}),
        ("vit", "cnn", {"s3_blocks": 1, "s4_blocks": 1, "alpha_s4": (0.0, 0.4)}),
        ("eva", "mixer", {}),
    ],
)
def test_what_the_views_share_changes_no_loss_and_no_gradient(teacher: str, family: str, settings: dict[str, Any], folder: Path) -> None:
    cache = open_cache(folder / f"cache-{teacher}")
    method = build(cache, family, **settings).double()
    passes: list[int] = []
    method.tail.register_forward_hook(lambda _module, inputs, _output: passes.append(len(inputs[0])))
    images, _, targets = batch_for(method, cache, torch.float64)
    load_benchmark().assert_equal_values(method, method.run_student(images), targets, tolerance=1e-9)
    alphas = method.alphas.values()
    expected = [3 * sum(any(pair) for pair in alphas)] + [3 * sum(s4 > 0 for _, s4 in alphas)] * bool(method.s4_modules)
    assert passes[: len(expected)] == expected  # all views in one pass
    assert sum(passes[len(expected) :]) == sum(expected)  # of the straightforward version, each by itself
    assert all(parameter.grad is None for parameter in method.tail.parameters())


def test_equal_values_are_really_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(folder / "cache-swin")
    method = build(cache).double()
    images, _, targets = batch_for(method, cache, torch.float64)
    swapped = ScaleKD._through_tail
    monkeypatch.setattr(
        ScaleKD,
        "_through_tail",
        lambda self, tokens, modules: dict(zip(tokens, reversed(swapped(self, tokens, modules).values()), strict=True)),
    )
    with pytest.raises(AssertionError, match="s3_spatial: relative distance"):
        load_benchmark().assert_equal_values(method, method.run_student(images), targets, tolerance=1e-5)


def test_bfloat16_autocast_stays_near_float32_in_losses_and_gradients(folder: Path) -> None:
    """Fresh projectors give maps that hardly vary from position to position: the frequency view keeps the little that does, with its rounding."""
    cache = open_cache(folder / "cache-vit")
    losses: list[dict[str, Tensor]] = []
    gradients: list[dict[str, Tensor]] = []
    for precision in ("fp32", "bf16"):
        method = build(cache, "cnn")
        with autocast(torch.device("cpu"), precision):
            parts = method(*batch_for(method, cache))
        assert all(part.dtype == torch.float32 for part in parts.values())
        weights = [*method.projectors.parameters()]
        found = {name: torch.autograd.grad(parts[name], weights, retain_graph=True, allow_unused=True) for name in parts if name[0] == "s"}
        assert all(one is None or one.dtype == torch.float32 for ones in found.values() for one in ones)
        losses.append(parts)
        gradients.append({name: torch.cat([one.flatten() for one in ones if one is not None]) for name, ones in found.items()})
    for name, expected in losses[0].items():
        torch.testing.assert_close(losses[1][name], expected, rtol=0.02, atol=0.01)
    cosines = {name: float(torch.cosine_similarity(expected, gradients[1][name], dim=0)) for name, expected in gradients[0].items()}
    for name, least in (("s3_spatial", 0.98), ("s4_spatial", 0.98), ("s3_frequency", 0.95), ("s4_frequency", 0.8)):
        assert least < cosines[name] < 1 - 1e-6, cosines  # and not float32 by mistake


def test_channels_last_changes_nothing_but_rounding(folder: Path) -> None:
    cache = open_cache(folder / "cache-swin")
    method = build(cache).double()
    images, labels, targets = batch_for(method, cache, torch.float64)
    expected = method(images, labels, targets)
    found = method.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last), labels, targets)
    assert method.projectors["s3_spatial"].convolution.weight.is_contiguous(memory_format=torch.channels_last)
    for name, part in expected.items():
        torch.testing.assert_close(found[name], part, rtol=1e-9, atol=1e-12)


# --- train ---


def config(folder: Path, out: Path, method: str = "kd", **options: Any) -> TrainConfig:
    name, args = (STUDENTS["cnn"][0], STUDENTS["cnn"][1]) if method == "scalekd" else (CNN, CNN_ARGS)
    return TrainConfig(
        cache=str(folder / "cache-swin"), students=(name,), model_kwargs=args, method=method, val=str(folder / "val"), out=str(out), epochs=2,
        batch_size=3, clip_grad=1.0, workers=0, device="cpu", **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [("kd", {"amp": True}), ("scalekd", {"amp": True, "amp_dtype": "bfloat16", "channels_last": True}), ("kd", {"channels_last": True})],
)
def test_a_faster_run_is_near_the_plain_one_and_resumes_to_the_same_bits(
    method: str, options: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain_run,) = train(config(folder, tmp_path / "plain", method))
    precisions: list[str] = []
    monkeypatch.setattr(kdcache.evaluate, "autocast", lambda device, precision: precisions.append(precision) or autocast(device, precision))
    (whole,) = train(config(folder, tmp_path / "whole", method, **options))
    amp = options.get("amp", False)
    assert {*precisions} == {{"float16": "fp16", "bfloat16": "bf16"}[options.get("amp_dtype", "float16")] if amp else "fp32"}

    def save_then_die(path: Path, state: dict[str, Any], **kwargs: Any) -> None:
        save_checkpoint(path, state, **kwargs)
        if path.parent.name == "last" and state["epoch"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.training.checkpoints, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(config(folder, tmp_path / "cut", method, **options))
    if amp:
        with pytest.raises(
            StudentError, match=r"field 'amp' \(and 1 more\) differs: that run has True, this command None; pass --amp to continue it"
        ):
            train(config(folder, tmp_path / "cut", method, resume=True))
    (cut,) = train(config(folder, tmp_path / "cut", method, resume=True, **options))
    assert_same_state(state_of(cut), state_of(whole))
    export = Path("export", "model.safetensors")
    assert Path(cut["path"], export).read_bytes() == Path(whole["path"], export).read_bytes()

    state, plain = state_of(whole), state_of(plain_run)
    assert bool(state["scaler"]) == (amp and "amp_dtype" not in options) and not plain["scaler"]
    assert (whole["id"] == plain_run["id"]) == (not amp)  # precision is of the recipe, memory format is not
    ours, theirs = (one["history"][0] for one in (state, plain))
    for name in (name for name in theirs if name.startswith("train_")):
        assert ours[name] == pytest.approx(theirs[name], rel=0.05), name
    assert ours != theirs  # it was computed otherwise
    weights, reference = load_file(Path(whole["path"], export)), load_file(Path(plain_run["path"], export))
    assert {name: weight.dtype for name, weight in weights.items()} == {name: weight.dtype for name, weight in reference.items()}
    args = yaml.safe_load(Path(whole["path"], "args.yaml").read_text())
    assert (args.get("amp", False), args["session"]["channels_last"]) == (amp, options.get("channels_last", False))


def test_amp_dtype_is_one_of_timms(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--amp-dtype 'fp16': expected one of float16, bfloat16"):
        config(folder, tmp_path, amp=True, amp_dtype="fp16")


def test_the_benchmark_runs(tmp_path: Path) -> None:
    child = Forked(python_script(SCRIPT, "--small", "--amp", "--channels-last", "--batch-size", "2", "--rounds", "1"), tmp_path / "log")
    assert child.wait(240) == 0, child.output()
    for line in ("losses and gradients in float64", "plain", "live", "tail, backward", "optimizer"):
        assert line in child.output()
