"""`scalekd` on the command line: a Swin that has learned its images, a CNN, a ViT and a Mixer that learn from its cache, and the same with the teacher live."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from helpers import make_shards, save_local_dir
from torch.nn.functional import cross_entropy

from cli.main import main
from kdcache import methods
from kdcache.cache import Cache
from kdcache.join import BatchLoader, CachedViews, EpochBatches, to_device
from kdcache.methods.scalekd import ScaleKD
from kdcache.opening import open_cache
from kdcache.students import build_student
from kdcache.targets import parse_target
from kdcache.teacher import load_teacher

SIZE, NUM_IMAGES = 64, 16
SWIN = "swin_tiny_patch4_window7_224"
SWIN_ARGS: dict[str, Any] = {
    "img_size": SIZE, "patch_size": 4, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "num_classes": 10,
}  # fmt: skip
"""4 × 4 tokens of 64 channels enter the tail, 2 × 2 of 128 leave it."""
STUDENTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "cnn": ("resnet18", {"channels": [16, 24, 32, 48]}, 12),
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 4, "num_heads": 2}, 20),
    "mixer": ("mixer_s32_224", {"mlp_ratio": [0.5, 0.25]}, 6),
}
"""Name, arguments, epochs: the wider, the fewer."""
PARTS = ("s3_spatial", "s4_spatial", "s3_frequency", "s4_frequency", "logits", "task")


def run_kdcache(*words: object) -> None:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ of 16 images, teacher/ that has learned their labels, cache/ by `extract --for scalekd` alone."""
    folder = tmp_path_factory.mktemp("training")
    make_shards(folder / "shards", num_shards=1, num_samples=NUM_IMAGES, size_wh=(SIZE, SIZE))
    torch.manual_seed(0)
    teacher = timm.create_model(SWIN, pretrained=False, **SWIN_ARGS)
    save_local_dir(teacher, folder / "teacher", SWIN_ARGS)
    words = ["--views", 1, "--augment", "none", "--workers", 0, "--device", "cpu"]
    run_kdcache("extract", folder / "shards", folder / "untrained", "--teacher", f"local-dir:{folder / 'teacher'}", *words)
    untrained = open_cache(folder / "untrained")
    views, labels = (batch_of(untrained, ())[name] for name in ("views", "labels"))
    images = load_teacher(f"local-dir:{folder / 'teacher'}").normalize(views)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    for _ in range(20):
        loss = cross_entropy(teacher.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (teacher.eval()(images).argmax(1) == labels).float().mean() > 0.9
    save_local_dir(teacher, folder / "teacher", SWIN_ARGS)
    run_kdcache("extract", folder / "shards", folder / "cache", "--teacher", f"local-dir:{folder / 'teacher'}", "--for", "scalekd", *words)
    return folder


def batch_of(cache: Cache, targets: tuple[str, ...]) -> Any:
    """All rows of view 0, as train reads them."""
    batches = EpochBatches(range(NUM_IMAGES), batch_size=NUM_IMAGES, num_views=1, seed=0)
    loader = BatchLoader(CachedViews(cache, targets=targets), batches, num_workers=0)
    (batch,) = loader.epoch(0)
    loader.close()
    return batch


@pytest.mark.parametrize("family", STUDENTS)
def test_every_part_of_the_loss_falls_from_the_first_epochs_to_the_last(family: str, folder: Path, tmp_path: Path) -> None:
    name, args, num_epochs = STUDENTS[family]
    words: list[object] = [word for key, value in args.items() for word in ("--model-kwargs", f"{key}={value}")]
    words += ["--epochs", num_epochs, "--batch-size", 8, "--lr", 3e-3, "--warmup-epochs", 1, "--clip-grad", 1, "--seed", 0, "--smoothing", 0]
    words += ["--out", tmp_path, "--workers", 0, "--device", "cpu"]
    run_kdcache("train", folder / "cache", "--student", name, "--method", "scalekd", *words)
    (run,) = tmp_path.iterdir()
    with open(run / "summary.csv", encoding="utf-8", newline="") as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == num_epochs and [key for key in epochs[0] if key.startswith("train_")] == [
        "train_loss",
        *(f"train_{part}" for part in PARTS),
    ]
    for part in PARTS:
        first, last = (sum(float(epoch[f"train_{part}"]) for epoch in some) for some in (epochs[:2], epochs[-2:]))
        assert last < 0.8 * first, part
    chosen = yaml.safe_load((run / "args.yaml").read_text())["resolved_settings"]
    record = json.loads((run / "export" / "config.json").read_text())["kdcache"]
    assert (chosen["preset"], chosen["heads_s4"], chosen["kd_alpha"]) == ("general", 8, 0.5) and record["recipe"]["settings"] == chosen
    student = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True)
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in build(open_cache(folder / "cache"), family).student.parameters())


def build(cache: Cache, family: str) -> ScaleKD:
    name, args, _ = STUDENTS[family]
    student = build_student(name, num_classes=10, view_size=SIZE, model_args=args, seed=0)
    method = methods.build("scalekd", student=student.model, cache=cache)
    assert isinstance(method, ScaleKD)
    return method


def test_a_step_from_the_cache_is_a_step_with_the_teacher_live_up_to_the_encodings(folder: Path) -> None:
    """Losses and gradients: the cached targets of the replayed views are what the teacher gives for them now."""
    cache = open_cache(folder / "cache")
    teacher = load_teacher(f"local-dir:{folder / 'teacher'}")
    method = build(cache, "cnn")
    batch = batch_of(cache, method.target_names)
    cached = {name: cache.encoding("teacher", name).decode(to_device(batch["targets"][name], torch.device("cpu"))) for name in method.target_names}
    live = teacher(batch["views"], list(teacher.resolve([parse_target(name) for name in method.target_names]).values()))
    steps = []
    for targets in (cached, live):
        method.zero_grad()
        parts = method(teacher.normalize(batch["views"]), batch["labels"], targets)
        torch.stack([*parts.values()]).sum().backward()
        steps.append((parts, torch.cat([parameter.grad.flatten() for parameter in method.parameters()])))
    for part in PARTS:
        torch.testing.assert_close(steps[0][0][part], steps[1][0][part], rtol=2e-3, atol=0)
    assert (steps[0][1] - steps[1][1]).norm() < 0.02 * steps[1][1].norm()
