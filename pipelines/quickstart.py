"""Real data end to end in a few minutes, on a laptop without a network: what kdcache is for, and what it saves.

The handwritten digits that ship with scikit-learn (1,797 images of 8×8 pixels, UCI) are packed into shards; a small timm ViT
is trained on their labels and becomes the teacher; its targets for 8 views of each image are extracted once; then students
are trained on labels alone and on the cache alone. The teacher saw all labels, so a student of the cache may match but not
beat all labels; the gain that counts is over few labels. The folder stays, to be looked at.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdcache.console import ProgressBar, counted, human_bytes, human_seconds, say
from kdcache.draws import draw
from kdcache.errors import KDCacheError, StoreError, UsageError
from kdcache.images import decode_image
from kdcache.plan import Policy, RandomResizedCrop, ViewPlan
from kdcache.shards import ShardFiles, scan_shard
from kdcache.sources import resolve_shards
from kdcache.views import render

from .extract import ExtractConfig, extract
from .pack import PackConfig, pack
from .train import TrainConfig, train
from .verification.verdict import Verdict
from .verify import verify

SIZE = 32
VIEWS = 8
NUM_CLASSES = 10
FEW_LABELS = 100
VAL_FRACTION = 5
"""One image in five is kept for validation."""

POLICY = Policy(crop=RandomResizedCrop(scale=(0.8, 1.0)), hflip=0.0)
"""No flip: a mirrored digit is another one."""

TEACHER_MODEL = "vit_tiny_patch16_224"
TEACHER_ARGS: dict[str, Any] = {
    "img_size": SIZE, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0,
    "global_pool": "avg", "class_token": False, "num_classes": NUM_CLASSES,
}  # fmt: skip
"""97.5, 97.5 and 96.7 % over three seeds in 31 CPU seconds (research: ecosystem §7)."""
TEACHER_EPOCHS = 20
TEACHER_BATCH = 32

STUDENT_ARGS = {name: value for name, value in TEACHER_ARGS.items() if name != "num_classes"} | {"patch_size": 8, "embed_dim": 48, "depth": 2}
STUDENT_STEPS = 600
"""220 steps are too few to show anything (research: ecosystem §7)."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Where, and with which seed."""

    out: str = "quickstart"
    seed: int = 0


@dataclass(frozen=True)
class StudentRun:
    """One line of the table."""

    title: str
    model: str
    model_args: Mapping[str, Any]
    method: str
    few: bool
    """Only the 100 labelled images' shard."""
    batch_size: int


RUNS: Sequence[StudentRun] = (
    StudentRun(f"{FEW_LABELS} labels alone", TEACHER_MODEL, STUDENT_ARGS, "ce", True, 50),
    StudentRun(f"cache of those {FEW_LABELS} images", TEACHER_MODEL, STUDENT_ARGS, "kd", True, 50),
    StudentRun("cache of all images, no labels", TEACHER_MODEL, STUDENT_ARGS, "kd", False, 64),
    StudentRun("all labels alone", TEACHER_MODEL, STUDENT_ARGS, "ce", False, 64),
    StudentRun("a CNN, cache of all, no labels", "test_resnet", {}, "kd", False, 64),
)


def quickstart(config: QuickstartConfig, *, progress: bool = True) -> dict[str, Any]:
    """Run everything; the facts that the table shows. Raises UsageError without scikit-learn, StoreError if the folder is in use."""
    from kdcache.device import torch_threads

    with torch_threads(1):  # models this small are fastest on one; two under contention were measured 60 times slower
        return _quickstart(config, progress=progress)


def _quickstart(config: QuickstartConfig, *, progress: bool) -> dict[str, Any]:
    begin = time.perf_counter()
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        in_use = any(out.iterdir())
    except OSError as error:
        raise StoreError(f"{out} can't be used as a folder: {error.strerror}; name a new one with 'kdcache quickstart DIR'") from error
    if in_use:
        raise StoreError(f"{out} is not empty; expected a new folder: remove it, or name another with 'kdcache quickstart DIR'")
    _step(1, "pack: handwritten digits → shards")
    num_train, num_val = pack_digits(out, progress=progress)

    _step(2, "teacher: a small ViT learns the labels")
    teacher_top1, teacher_seconds = train_teacher(out, config.seed, progress=progress)
    say(f"teacher: {teacher_top1:.1f} % on the validation images after {human_seconds(teacher_seconds)}")

    _step(3, f"extract: {VIEWS} views of each image through the teacher, once")
    summary = extract(
        ExtractConfig(
            shards=str(out / "shards" / "train"),
            cache=str(out / "cache"),
            teacher=f"local-dir:{out / 'teacher'}",
            targets=("logits", "features@norm:int8"),
            views=VIEWS,
            augment=POLICY,
            workers=0,
            device="cpu",
            seed=config.seed,
            min_teacher_top1=80.0,
        ),
        progress=progress,
    )

    _step(4, "train: students, with no teacher in memory")
    results = [_train_student(out, run, num_train, config.seed, progress=progress) for run in RUNS]

    _step(5, "verify: every byte, and every view rendered again")
    verdict = verify(str(out / "cache"), views="all", workers=0, progress=progress)
    for problem in verdict.problems:
        say(f"problem: {problem.kind} {problem.shard} {problem.key} {problem.detail}")

    passes = summary.rows * VIEWS
    facts = {
        "teacher_top1": teacher_top1,
        "teacher_seconds": teacher_seconds,
        "extract": summary.to_json(),
        "runs": [{"title": run.title, **result} for run, result in zip(RUNS, results, strict=True)],
        "val_images": num_val,
        "teacher_passes": passes,
        "teacher_passes_online": sum(_online_passes(run) for run in RUNS),
        "verify": verdict.to_json(),
        "seconds": time.perf_counter() - begin,
    }
    (out / "quickstart.json").write_text(json.dumps(facts, indent=1) + "\n")
    _report(out, facts, verdict)
    return facts


def _step(number: int, title: str) -> None:
    say(f"\n[{number}/5] {title}")


# --- data ------------------------------------------------------------------------------------------------------------


def pack_digits(out: Path, *, progress: bool) -> tuple[int, int]:
    """Write the images as an ImageFolder and pack it; the numbers of training and validation images.

    The first training shard holds 10 images of each class: 'the first shard alone' is the few-label experiment.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("quickstart needs scikit-learn for its images; install it with: pip install 'kdcache[quickstart]'") from error
    images, labels = load_digits(return_X_y=True)
    seen = dict.fromkeys(range(NUM_CLASSES), 0)
    num_train = 0
    for number, (flat, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        seen[label] += 1
        if seen[label] % VAL_FRACTION == 0:
            split = "val"
        else:
            num_train += 1
            split = "few" if seen[label] - seen[label] // VAL_FRACTION <= FEW_LABELS // NUM_CLASSES else "more"
        folder = out / "images" / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.round(flat.reshape(8, 8) * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    for split, shards, per_shard in (("few", "train", FEW_LABELS), ("more", "train", 191), ("val", "val", 360)):
        pack(
            PackConfig(images=str(out / "images" / split), out=str(out / "shards" / shards), name=f"digits-{split}", samples_per_shard=per_shard),
            progress=progress,
        )
    return num_train, len(labels) - num_train


# --- teacher ---------------------------------------------------------------------------------------------------------


def train_teacher(
    out: Path, seed: int, *, name: str = TEACHER_MODEL, args: Mapping[str, Any] = TEACHER_ARGS, epochs: int = TEACHER_EPOCHS, progress: bool
) -> tuple[float, float]:
    """Train the teacher on all training labels and save it for `local-dir:`; (top-1 in percent, seconds)."""
    import timm
    import torch
    from timm.models import save_for_hf
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    from kdcache.pixels import Normalize
    from kdcache.timm_models import mean_std_of

    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, **args)
    size = args["img_size"]
    normalize = Normalize(*mean_std_of(model), size)
    plan = ViewPlan(dataset="digits-teacher", policy=POLICY, size=size, seed=seed)
    train_images, val_images = load_images(out / "shards" / "train"), load_images(out / "shards" / "val")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    steps = epochs * (len(train_images) // TEACHER_BATCH)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, warmup_prefix=True, t_in_epochs=False)
    loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    step = 0
    with ProgressBar(total=steps, unit="step", desc="teacher", disable=not progress) as bar:
        for epoch in range(epochs):
            views, labels = render_all(plan, train_images, view=epoch)
            model.train()
            order = torch.randperm(len(views))
            for start in range(0, len(order) - TEACHER_BATCH + 1, TEACHER_BATCH):
                chosen = order[start : start + TEACHER_BATCH]
                loss = loss_fn(model(normalize(views[chosen])), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scheduler.step_update(step)
                optimizer.step()
                step += 1
                bar.update()
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
    model.eval()
    whole = ViewPlan(dataset="digits-teacher", policy=Policy(crop=RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))), size=size)
    views, labels = render_all(whole, val_images, view=0)
    with torch.inference_mode():
        correct = int((model(normalize(views)).argmax(dim=1) == labels).sum())
    data_config = {"crop_pct": 1.0}
    save_for_hf(model, str(out / "teacher"), model_args=dict(args), data_config=data_config, safe_serialization=True)
    return 100 * correct / len(views), time.perf_counter() - begin


def load_images(folder: Path) -> list[tuple[str, str, Any, int]]:
    """(shard, key, decoded image, label) of every sample: the digits fit in memory."""
    files = ShardFiles()
    return [
        (source.name, sample.key, decode_image(files.read(source, sample.key, sample.image_offset, sample.image_size)), sample.label)
        for source in resolve_shards(str(folder))
        for sample in scan_shard(source).samples
    ]


def render_all(plan: ViewPlan, images: Sequence[tuple[str, str, Any, int]], *, view: int) -> tuple[Any, Any]:
    import torch

    views = np.stack([render(image, draw(plan, shard, key, view, image.size)) for shard, key, image, _ in images])
    return torch.from_numpy(views), torch.tensor([label for *_, label in images])


# --- students --------------------------------------------------------------------------------------------------------


def _train_student(out: Path, run: StudentRun, num_train: int, seed: int, *, progress: bool) -> dict[str, Any]:
    """One student; its summary as `kdcache train --json` gives it."""
    images = FEW_LABELS if run.few else num_train
    epochs = round(STUDENT_STEPS / (images // run.batch_size))
    say(f"{run.title}:")
    config = TrainConfig(
        cache=str(out / "cache"),
        students=(run.model,),
        model_kwargs=run.model_args,
        num_classes=NUM_CLASSES,
        method=run.method,
        val=str(out / "shards" / "val"),
        val_crop_pct=1.0,
        out=str(out / "runs"),
        limit_shards=1 if run.few else None,
        epochs=epochs,
        batch_size=run.batch_size,
        opt="adamw",
        lr=3e-3,
        weight_decay=0.05,
        opt_betas=(0.9, 0.98),
        warmup_epochs=epochs // 10,
        clip_grad=1.0,
        smoothing=0.1,
        kd_temperature=2.0 if run.method == "kd" else None,
        task_loss_weight=0.0 if run.method == "kd" else None,
        distill_loss_weight=1.0 if run.method == "kd" else None,
        workers=0,
        device="cpu",
        seed=seed,
        val_interval=max(1, epochs // 10),
    )
    return train(config, progress=progress)[0]


def _online_passes(run: StudentRun) -> int:
    """Teacher passes that this run would have cost with the teacher in memory."""
    return STUDENT_STEPS * run.batch_size if run.method == "kd" else 0


def _report(out: Path, facts: Mapping[str, Any], verdict: Verdict) -> None:
    say(f"\n{'student trained on':<34} {'method':<6} {'top-1':>7} {'seconds':>8}  {'teacher passes if online':>24}")
    for run, result in zip(RUNS, facts["runs"], strict=True):
        online = _online_passes(run)
        say(f"{run.title:<34} {run.method:<6} {result['top1']:6.1f} % {result['seconds']:8.1f}  {f'{online:,}' if online else '-':>24}")
    say(f"{'(the teacher, all labels)':<34} {'':<6} {facts['teacher_top1']:6.1f} % {facts['teacher_seconds']:8.1f}")
    say(
        f"\nteacher passes: {facts['teacher_passes']:,} once for the cache, in place of {facts['teacher_passes_online']:,} for these three distilled"
        f" students online; cache {human_bytes(verdict.bytes)}, {'sound' if verdict.ok else 'NOT SOUND'}, root {verdict.root}"
    )
    say(
        f"{facts['val_images']} validation images: differences below about 1.5 points are noise. Top-1 is that of each run's best evaluation."
        f" The teacher has seen all labels."
    )
    say(f"done in {human_seconds(facts['seconds'])}; everything is in {out}/. What to type next:\n")
    say(f"  kdcache inspect {out}/cache")
    say(f"  kdcache inspect {out}/cache --shard digits-few-0000")
    say(f"  kdcache extract {out}/shards/train {out}/cache --teacher local-dir:{out}/teacher --target features@blocks.0:int8")
    say(f"  kdcache train {out}/cache --student test_convnext --method kd --task-loss-weight 0 --epochs 30 --val {out}/shards/val --out {out}/runs")
    if not verdict.ok:
        raise KDCacheError(
            f"the cache in {out}/cache is not sound: {counted(len(verdict.problems), 'problem')}, the first: {verdict.problems[0].detail}"
        )
