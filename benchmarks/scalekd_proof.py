"""ScaleKD on real images: a Swin teacher trained here, and a CNN, a ViT and a Mixer that learn from its cache, each by the command line alone.

    python benchmarks/scalekd_proof.py DIR [--students cnn,vit,mixer] [--methods ce,kd,scalekd,online] [--seeds 0,1,2] [--steps 300] [--resume] [--json FILE]

Images and few labels as in the quickstart: scikit-learn's digits, 100 of them with their labels to train on, the teacher has seen all. DIR keeps
shards, teacher, cache and runs: a repeated command trains what is missing and prints the tables, and several may share students and seeds.

    ce       labels alone                                     kd      and the logits, with ScaleKD's constants
    scalekd  and the maps, through the teacher's cached tail  online  the same with the teacher in memory: online_scalekd.py

Prints for each student: top-1 of the last weights on the validation images, mean and standard deviation over the seeds; the largest difference between
`scalekd` and `online` at one seed, in top-1 and in the loss of the first step, where the weights are the same; every part of the loss, mean over the
first and the last tenth of the epochs, and the seeds in which it fell. On one CPU thread.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import MlpMixer, build_model_with_cfg, register_model

from cli.main import main as kdcache
from pipelines import quickstart

SIZE = 48
TEACHER_MODEL = "swin_tiny_patch4_window7_224"
TEACHER_ARGS: dict[str, Any] = {
    "img_size": SIZE, "patch_size": 2, "window_size": 3, "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8],
    "num_classes": quickstart.NUM_CLASSES,
}  # fmt: skip
"""6 × 6 tokens of 96 channels enter the tail, 3 × 3 of 192 leave it."""
TEACHER_EPOCHS = 15

STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("resnet18", {"channels": [16, 32, 64, 128]}),
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "global_pool": "avg", "class_token": False}),
    "mixer": ("mixer_digits", {}),
}
"""Positions of stage 3 and 4: 3 × 3 and 2 × 2; 6 × 6, of blocks 3 and 4; likewise."""
METHODS: dict[str, list[str]] = {
    "ce": ["--method", "ce"],
    "kd": ["--method", "kd", "--kd-temperature", "1", "--task-loss-weight", "0.5"],
    "scalekd": ["--method", "scalekd"],
    "online": ["--method", "online_scalekd:OnlineScaleKD"],
}
BATCH = 25
EPOCH_STEPS = quickstart.FEW_LABELS // BATCH


@register_model
def mixer_digits(pretrained: bool = False, **model_args: Any) -> MlpMixer:
    """An MLP-Mixer that is small enough: timm's own begin at 512 channels, which can't be overridden."""
    args = {"patch_size": 8, "num_blocks": 4, "embed_dim": 64} | model_args
    model: MlpMixer = build_model_with_cfg(MlpMixer, "mixer_digits", pretrained, **args)
    return model


# --- what is run -----------------------------------------------------------------------------------------------------


def run_kdcache(*words: object) -> dict[str, Any]:
    """`kdcache WORDS --json` in this process; what it prints."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(io.StringIO()):
        try:
            kdcache([*map(str, words), "--json"], standalone_mode=False)
        except SystemExit as done:  # extract ends in its exit code
            if done.code:
                raise
    found: dict[str, Any] = json.loads(stdout.getvalue())
    return found


def prepare(folder: Path) -> None:
    """shards/, teacher/ and cache/ in a new folder."""
    begin = time.perf_counter()
    quickstart.pack_digits(folder, progress=False)
    top1, seconds = quickstart.train_teacher(folder, 0, name=TEACHER_MODEL, args=TEACHER_ARGS, epochs=TEACHER_EPOCHS, progress=False)
    policy = folder / "policy.yaml"
    policy.write_text("crop: {kind: random_resized, scale: [0.8, 1.0]}\nhflip: 0\n")
    words = ["--for", "scalekd", "--views", quickstart.VIEWS, "--augment", policy, "--workers", 0, "--device", "cpu"]
    run_kdcache("extract", folder / "shards" / "train", folder / "cache", "--teacher", f"local-dir:{folder / 'teacher'}", *words)
    facts = {"teacher_top1": top1, "teacher_seconds": seconds, "seconds": time.perf_counter() - begin}
    (folder / "prepared.json").write_text(json.dumps(facts) + "\n")


def train(folder: Path, student: str, method: str, *, seed: int, steps: int, resume: bool) -> Path:
    """Train one student, unless that is done; its run folder."""
    name, model_args = STUDENTS[student]
    epochs = steps // EPOCH_STEPS
    words: list[object] = [word for key, value in model_args.items() for word in ("--model-kwargs", f"{key}={value}")]
    words += [*METHODS[method], "--limit-shards", 1, "--num-classes", quickstart.NUM_CLASSES, "--epochs", epochs, "--batch-size", BATCH]
    words += ["--lr", 3e-3, "--opt-betas", 0.9, 0.98, "--warmup-epochs", epochs // 10, "--clip-grad", 1, "--seed", seed]
    words += ["--val", folder / "shards" / "val", "--val-crop-pct", 1, "--val-interval", epochs, "--log-interval", 1]
    words += ["--out", folder / "runs", "--workers", 0, "--device", "cpu", *(["--resume"] if resume else [])]
    (run,) = run_kdcache("train", folder / "cache", "--student", name, *words)["runs"]
    return Path(run["path"])


# --- what is shown ---------------------------------------------------------------------------------------------------


def read_epochs(run: Path) -> list[dict[str, float]]:
    with open(run / "summary.csv", encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def figures_of(run: Path) -> dict[str, Any]:
    """Top-1 of the last weights, seconds of all epochs, and each part: in the first step, and over the first and the last tenth of the epochs."""
    epochs, lines = read_epochs(run), read_lines(run)
    tenth = max(1, len(epochs) // 10)
    parts = [name for name in epochs[0] if name.startswith("train_") and name != "train_loss"]
    return {
        "top1": epochs[-1]["eval_top1"],
        "seconds": sum(line["seconds"] for line in lines if "seconds" in line),
        "first_step": {name.removeprefix("train_"): lines[0][name.removeprefix("train_")] for name in parts},
        "parts": {
            name.removeprefix("train_"): [statistics.mean(row[name] for row in some) for some in (epochs[:tenth], epochs[-tenth:])] for name in parts
        },
    }


def show(student: str, figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    print(f"\n{student}: {STUDENTS[student][0]}")
    for method, runs in figures.items():
        top1 = [run["top1"] for run in runs]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        each = " ".join(f"{value:.1f}" for value in top1)
        print(f"  {method:<8} top-1 {statistics.mean(top1):.1f} ± {spread:.1f} ({each}), {statistics.mean(run['seconds'] for run in runs):.1f} s")
    if "scalekd" not in figures:
        return
    cached = figures["scalekd"]
    if "online" in figures:
        pairs = list(zip(cached, figures["online"], strict=True))
        apart = max(abs(a["top1"] - b["top1"]) for a, b in pairs)
        steps = {
            part: max(abs(a["first_step"][part] - b["first_step"][part]) / b["first_step"][part] for a, b in pairs)
            for part in cached[0]["first_step"]
        }
        worst = ", ".join(f"{part} {value:.1e}" for part, value in steps.items())
        print(f"  cached against online at one seed: top-1 {apart:.1f}; first step, relative: {worst}")
    for part in cached[0]["parts"]:
        ends = [run["parts"][part] for run in cached]
        first, last = (statistics.mean(one) for one in zip(*ends, strict=True))
        print(f"  {part:<13} {first:.4f} → {last:.4f}; fell in {sum(b < a for a, b in ends)} of {len(ends)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--students", default=",".join(STUDENTS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--resume", action="store_true", help="Continue runs that were cut off.")
    parser.add_argument("--json", type=Path, help="Write the figures here too.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not (given.folder / "prepared.json").exists():
        prepare(given.folder)
    facts = json.loads((given.folder / "prepared.json").read_text())
    print(
        f"teacher: top-1 {facts['teacher_top1']:.1f}, trained in {facts['teacher_seconds']:.0f} s; {quickstart.FEW_LABELS} images, {given.steps} steps"
    )
    figures: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for student in given.students.split(","):
        figures[student] = {method: [] for method in given.methods.split(",")}
        for method, seed in itertools.product(figures[student], given.seeds.split(",")):
            run = train(given.folder, student, method, seed=int(seed), steps=given.steps, resume=given.resume)
            figures[student][method].append(figures_of(run))
        show(student, figures[student])
        if given.json:
            given.json.write_text(json.dumps(facts | {"students": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
