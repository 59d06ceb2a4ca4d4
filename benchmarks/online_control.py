"""Cached against online: the same students, loop, seeds and views, once with targets from the cache and once with the teacher live.

    python benchmarks/online_control.py DIR [--methods kd,nkd+vitkd] [--seeds 3] [--steps 600] [--all-labels] [--device cpu]

DIR is the folder of a finished `kdcache quickstart DIR`. What the methods need is added to its cache first. Students learn from the
100 images of its first shard and their labels (all images with --all-labels). Prints a row a method: top-1 of the last weights on the validation
images, mean and standard deviation over the seeds, for both sources, the largest difference of a seed, and the median time of a step
with its loading. Beside a row for the labels alone. Everything runs in one process, on one CPU thread by default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.cache import Cache
from kdcache.evaluate import EvaluationSet, Evaluator
from kdcache.join import Batch, BatchLoader, CachedViews, EpochBatches, to_device
from kdcache.methods import build, needed, parse_settings
from kdcache.opening import open_cache
from kdcache.shards import scan_shard
from kdcache.sources import resolve_shards
from kdcache.students import build_student
from kdcache.targets import parse_target
from kdcache.teacher import Teacher, load_teacher
from pipelines.extract import ExtractConfig, extract
from pipelines.quickstart import NUM_CLASSES, STUDENT_ARGS, TEACHER_MODEL

METHODS = ("kd", "dkd", "nkd", "wsld", "vitkd", "nkd+vitkd", "mimic", "mgd", "frequency", "uskd")
SETTINGS: dict[str, dict[str, Any]] = {"kd": {"temperature": 2.0}}
"""The quickstart's temperature; every other method has its defaults, and the labels' cross-entropy beside it."""


@dataclass(frozen=True)
class Outcome:
    top1: float
    step_ms: float


def student_of(cache: Cache, method: str, teacher: Teacher | None, *, seed: int, steps: int, few: bool, device: torch.device, val: Path) -> Outcome:
    """Train one student. teacher: run live on every batch's views in place of the cached targets; None for the cache."""
    student = build_student(TEACHER_MODEL, num_classes=NUM_CLASSES, view_size=cache.plan.size, model_args=STUDENT_ARGS, seed=seed)
    settings = SETTINGS.get(method, {})
    layer, targets = needed(method, parse_settings(method, settings), cache)
    module = build(method, student=student.model, cache=cache, settings=settings).to(device)
    live = teacher if layer is not None else None
    resolved = list(live.resolve([parse_target(target) for target in targets]).values()) if live is not None else []
    encodings = {target: cache.encoding(layer.name, target) for target in targets} if layer is not None and live is None else {}
    normalize = student.normalize().to(device)
    rows = np.nonzero(cache.rows.shard == 0)[0] if few else np.arange(len(cache.rows))
    batches = EpochBatches(rows, batch_size=50 if few else 64, num_views=cache.num_views, seed=seed)
    parts = module.target_parts() if encodings else {}
    dataset = CachedViews(cache, teacher=layer.name if layer is not None else None, targets=tuple(encodings), parts=parts, check_views=0.0)
    loader = BatchLoader(dataset, batches, num_workers=0)

    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    optimizer = create_optimizer_v2(module, opt="adamw", lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, warmup_prefix=True, t_in_epochs=False)

    def step(batch: Batch) -> None:
        views = batch["views"].to(device)
        if live is not None:
            values = live(views, resolved)
        else:
            values = {name: encoding.decode(to_device(batch["targets"][name], device)) for name, encoding in encodings.items()}
        loss = torch.stack(list(module(normalize(views), batch["labels"].to(device), values).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    module.train()
    times: list[float] = []
    done, epoch = 0, 0
    while done < steps:
        begin = time.perf_counter()
        for batch in loader.epoch(epoch):
            scheduler.step_update(done)
            step(batch)
            done += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            if done == steps:
                break
        epoch += 1
    loader.close()
    indexes = tuple(scan_shard(source) for source in resolve_shards(str(val)))
    evaluation = Evaluator(EvaluationSet(indexes, student, crop_pct=1.0), batch_size=256, num_workers=0)(student.model, device)
    return Outcome(evaluation.top1, 1e3 * statistics.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--all-labels", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="Write the figures here too.")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    device = torch.device(given.device)
    methods = given.methods.split(",")
    source = f"local-dir:{given.folder / 'teacher'}"
    shards, path = str(given.folder / "shards" / "train"), str(given.folder / "cache")
    extract(ExtractConfig(shards=shards, cache=path, teacher=source, methods=methods, workers=0))
    cache, val = open_cache(path), given.folder / "shards" / "val"
    teacher = load_teacher(source, device=device)
    images = "all images" if given.all_labels else f"{int((cache.rows.shard == 0).sum())} images"
    print(f"{images}, their labels, {given.steps} steps, {given.seeds} seeds; top-1 % on the validation images, mean ± standard deviation")
    print(f"{'method':<16} {'cached':>14} {'online':>14} {'largest |Δ|':>12} {'ms a step':>18} {'online/cached':>14}")
    figures: dict[str, Any] = {}
    for method in ["ce", *methods]:
        outcomes: dict[str, list[Outcome]] = {"cached": [], "online": []}
        for seed in range(given.seeds):
            for name, live in (("cached", None), ("online", teacher)):
                if name == "online" and not needed(method, parse_settings(method), cache)[1]:
                    continue
                outcomes[name].append(student_of(cache, method, live, seed=seed, steps=given.steps, few=not given.all_labels, device=device, val=val))
        figures[method] = {name: [vars(one) for one in found] for name, found in outcomes.items()}
        print(row(method, outcomes["cached"], outcomes["online"]), flush=True)
        if given.json:
            given.json.write_text(json.dumps(figures, indent=1) + "\n")


def row(method: str, cached: list[Outcome], online: list[Outcome]) -> str:
    """One line of the table; a method without a teacher has no online side."""

    def accuracy(found: list[Outcome]) -> str:
        spread = statistics.stdev(one.top1 for one in found) if len(found) > 1 else 0.0
        return f"{statistics.mean(one.top1 for one in found):.1f} ± {spread:.1f}"

    ours = statistics.median(one.step_ms for one in cached)
    if not online:
        return f"{method:<16} {accuracy(cached):>14} {'-':>14} {'-':>12} {ours:>18.1f} {'-':>14}"
    theirs = statistics.median(one.step_ms for one in online)
    apart = max(abs(a.top1 - b.top1) for a, b in zip(cached, online, strict=True))
    return f"{method:<16} {accuracy(cached):>14} {accuracy(online):>14} {apart:>12.1f} {f'{ours:.1f} / {theirs:.1f}':>18} {theirs / ours:>14.2f}"


if __name__ == "__main__":
    main()
