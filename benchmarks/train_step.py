"""Where stage two's time goes: a step from the cache against one without a teacher and one with it live, the loader by source and target, a worker's time.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --parts loader split memory --samples 512
    python benchmarks/train_step.py --parts step --device cuda --workers 8 --batch-size 128 --samples 2048 --rounds 30 --precision bf16

Makes JPEGs of 500×375 pixels. Teachers and students are randomly initialised; views have 224 pixels.

* step: for each pair of teacher and student `kdcache train`'s own loop, once by `ce` (labels only), once by `kd` (logits from the cache), once by a method of
  token maps (`vitkd`, of CNNs `mimic`; int8 maps from the cache), once by `kd` with the teacher's forward on the same views in place of the cache. A step is from asking
  for its batch to the end of its update. Each has a loader of its own; the four take turns, step by step. Ratios are to `ce`. Budget (DESIGN §12): `kd` ≤ 1.05.
* loader: ms a sample of the loading alone by where views come from (rendered from tars, stored raw, stored jpeg95) and what is read beside them.
* split: of one worker's time index (order, grouping), tar read, decode, render, digest (of 5 % of the views), params, target read with decompression; and the hand-over to
  the training process, which is what a worker process needs beyond the same work in this one.
* memory: shared memory of the batches under way for several --prefetch-bytes, beside what `plan_prefetch` allows, while nothing takes them.

On a CPU the clock is this process's own CPU time, which busy neighbours disturb least, and loading is in this process (--workers 0); on a GPU the wall, after synchronising.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from extract import make_shard  # the script beside this one
from timm.models import save_for_hf

import kdcache.join
import kdcache.shards
from kdcache.cache import Cache, Replay
from kdcache.join import Batch, BatchLoader, CachedViews, EpochBatches
from kdcache.opening import open_cache
from kdcache.targets import parse_target
from kdcache.teacher import Teacher, load_teacher
from pipelines.extract import ExtractConfig, extract
from pipelines.training.config import TrainConfig
from pipelines.training.data import open_data
from pipelines.training.gang import portion_of
from pipelines.training.loop import StudentLoop
from pipelines.training.run import Run
from pipelines.training.shared_batch import Portion, SharedBatch, dataset_of, union

PAIRS = {
    "ViT-Ti → test_vit": ("vit_tiny_patch16_224", "test_vit", "vitkd"),
    "ViT-S → ViT-Ti": ("vit_small_patch16_224", "vit_tiny_patch16_224", "vitkd"),
    "ViT-B → ResNet-18": ("vit_base_patch16_224", "resnet18", "mimic"),
}
Live = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""uint8 views (B, H, W, 3) → their logits, from a teacher in memory."""
SMALL = {"tiny → tiny": ("test_vit", "test_vit", "vitkd")}
"""For a test of this script."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("step", "loader", "split", "memory"), default=("step", "loader", "split", "memory"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="Of the students and of the live teacher.")
    parser.add_argument("--small", action="store_true", help="One pair of tiny models.")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "shards").mkdir()
        for number in range(4):
            make_shard(root / "shards" / f"bench-{number:04d}.tar", num_samples=-(-args.samples // 4), seed=number)
        if "step" in args.parts:
            print(f"step: batches of {args.batch_size}, {args.device}, {args.precision}, {args.workers} workers, medians of {args.rounds} rounds")
            print(f"{'':<20} {'ce':>9} {'kd, cached':>16} {'maps, cached':>22} {'kd, live teacher':>18}")
            for name, pair in (SMALL if args.small else PAIRS).items():
                measure_steps(root, name, pair, args)
        if {"loader", "split", "memory"} & set(args.parts):
            caches = make_caches(root, small=args.small)
            for part, measure in (("loader", measure_loader), ("split", measure_split), ("memory", measure_memory)):
                if part in args.parts:
                    measure(caches, args)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """Seconds: of this process's CPUs, or on the wall once the device has done what it was given."""
    synchronise(device)
    return time.process_time() if device == "cpu" else time.perf_counter()


# --- step ------------------------------------------------------------------------------------------------------------


def measure_steps(root: Path, name: str, pair: tuple[str, str, str], args: argparse.Namespace) -> None:
    """One line: ce, kd, maps, live."""
    teacher, student, maps = pair
    path, source = str(root / f"cache-{teacher}"), str(root / teacher)
    save_for_hf(timm.create_model(teacher, img_size=224, num_classes=1000), source, model_args={"img_size": 224}, safe_serialization=True)
    source = f"local-dir:{source}"
    asked = {"shards": str(root / "shards"), "cache": path, "teacher": source, "views": 1, "workers": args.workers, "device": args.device}
    extract(ExtractConfig(**asked, targets=("logits",), methods=(maps,)))
    with ExitStack() as stack:
        steps: dict[str, Callable[[], None]] = {}
        for variant, method in (("ce", "ce"), ("kd", "kd"), ("maps", maps), ("live", "kd")):
            config = TrainConfig(
                cache=path, students=(student,), method=method, out=str(root / "runs" / name / variant), epochs=10_000, batch_size=args.batch_size,
                workers=args.workers, device=args.device, recovery_interval=0, shuffle="full", num_classes=1000,
                amp=args.precision == "bf16", amp_dtype="bfloat16",
            )  # fmt: skip
            data = open_data(config)
            run = Run(config, data, student)
            run.claim()
            stack.callback(run.release)
            loop = run.begin()
            portion = portion_of(loop)
            live: Live | None = None
            if variant == "live":
                live = live_logits(load_teacher(source, device=torch.device(args.device), precision=args.precision))
                portion = dataclasses.replace(portion, names={}, components={}, encodings={})  # nothing is read of the cache but the views
            dataset = dataset_of(data.cache, union([portion]), check_views=config.check_views)
            loader = BatchLoader(dataset, loop.batches, num_workers=args.workers, pin_memory=args.device.startswith("cuda"))
            stack.callback(loader.close)
            loop.begin()
            stack.callback(loop.close)
            steps[variant] = stepper(loop, loader, portion, live)
        times: dict[str, list[float]] = {variant: [] for variant in steps}
        for number in range(args.rounds + 2):
            names = list(steps)
            for variant in names[number % 4 :] + names[: number % 4]:
                begin = clock(args.device)
                steps[variant]()
                times[variant].append(1e3 * (clock(args.device) - begin))
    medians = {variant: statistics.median(found[2:]) for variant, found in times.items()}
    shown = [f"{medians[variant]:8.0f} ms, {medians[variant] / medians['ce']:.3f} ×" for variant in ("kd", "maps", "live")]
    print(f"{name:<20} {medians['ce']:6.0f} ms {shown[0]:>16} {shown[1]:>20} ({maps}) {shown[2]:>16}", flush=True)


def live_logits(teacher: Teacher) -> Live:
    targets = list(teacher.resolve([parse_target("logits")]).values())
    return lambda views_BHWC: teacher(views_BHWC, targets)["logits"]


def stepper(loop: StudentLoop, loader: BatchLoader, portion: Portion, live: Live | None) -> Callable[[], None]:
    """A step, from asking for its batch on. live: gives the logits of views in the place of the cache."""
    batches: Iterator[Batch] = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))

    def step() -> None:
        batch = next(batches)
        inputs = SharedBatch(batch, loop.device).inputs(portion)
        if live is not None:
            inputs = inputs._replace(targets={"logits": live(batch["views"])})
        loop.train_step(inputs)

    return step


# --- loader ----------------------------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[str, ...]] = {
    "views alone": (),
    "logits": ("int8/logits",),
    "topk": ("klt/logits",),
    "logits, int8 map": ("int8/logits", "int8/features@norm"),
    "logits, klt map": ("int8/logits", "klt/features@norm"),
}
"""What is read beside the views → targets, as CachedViews takes them."""


def make_caches(root: Path, *, small: bool) -> dict[str, Cache]:
    """A cache for each source of views, from one teacher under two names, with 196 tokens of 384 channels and 1000 classes (small: 16 of 64)."""
    model_args = {"img_size": 224, "patch_size": 56 if small else 16, "embed_dim": 64 if small else 384, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **model_args)
    save_for_hf(model, str(root / "teacher"), model_args=model_args, safe_serialization=True)
    caches: dict[str, Cache] = {}
    for codec in (None, "raw", "jpeg95"):
        path = str(root / f"cache-{codec or 'rendered'}")
        for layer, targets in (("int8", ("logits", "features@norm:int8")), ("klt", ("logits:topk=10", "features@norm:klt=0.99"))):
            extract(
                ExtractConfig(
                    shards=str(root / "shards"), cache=path, teacher=f"local-dir:{root / 'teacher'}", name=layer, targets=targets, views=1, workers=0,
                    device="cpu", store_views=codec,
                )
            )  # fmt: skip
        caches[codec or "rendered"] = open_cache(path)
    return caches


def batches_of(cache: Cache, args: argparse.Namespace) -> EpochBatches:
    """An epoch of all rows, several times over so that there is something to measure."""
    rows = np.arange(len(cache.rows))
    return EpochBatches(np.tile(rows, max(1, 512 // len(rows))), batch_size=max(64, args.batch_size), num_views=1, seed=0)


def family_seconds() -> tuple[float, float]:
    """CPU seconds of this process, and, to a hundredth, of its children."""
    return time.process_time(), sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())


def measure_loader(caches: Mapping[str, Cache], args: argparse.Namespace) -> None:
    """A line for each source: CPU ms a sample in this process; then with two workers those of workers and parent, and samples a second on the wall."""
    print(
        f"loader: batches of {max(64, args.batch_size)}, medians of {args.rounds} rounds; CPU ms a sample in one process | worker + parent process, img/s of 2"
    )
    print(f"{'':<10}" + "".join(f"{name:>34}" for name in TARGETS))
    for source, cache in caches.items():
        cells: list[str] = []
        for targets in TARGETS.values():
            figures: list[list[float]] = []
            for workers in (0, 2):
                loader = BatchLoader(CachedViews(cache, targets=targets, check_views=0.05), batches_of(cache, args), num_workers=workers)
                rounds: list[tuple[float, float, float]] = []
                for epoch in range(args.rounds + 1):
                    before, begin = family_seconds(), time.perf_counter()
                    count = sum(len(batch["labels"]) for batch in loader.epoch(epoch))
                    wall, after = time.perf_counter() - begin, family_seconds()
                    rounds.append((1e3 * (after[0] - before[0]) / count, 1e3 * (after[1] - before[1]) / count, count / wall))
                loader.close()
                figures.append([statistics.median(column) for column in zip(*rounds[1:], strict=True)])
            (alone, _, _), (parent, worker, rate) = figures
            cells.append(f"{alone:.3f} | {worker:.3f} + {parent:.3f}, {rate:,.0f}")
        print(f"{source:<10}" + "".join(f"{cell:>34}" for cell in cells), flush=True)


# --- split -----------------------------------------------------------------------------------------------------------


class SplitClock:
    """CPU seconds of each part of the work, without those of the parts within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within: list[float] = []

    def wrap(self, stack: ExitStack, owner: Any, name: str, part: str) -> None:
        """Time a function of a module or class until the stack is left. Of a generator every step is timed."""
        function = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            result = self.timed(part, lambda: function(*args, **options))
            return self._stepwise(part, result) if hasattr(result, "__next__") else result

        setattr(owner, name, call)
        stack.callback(setattr, owner, name, function)

    def _stepwise(self, part: str, steps: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while (value := self.timed(part, lambda: next(steps, end))) is not end:
            yield value

    def timed(self, part: str, work: Callable[[], Any]) -> Any:
        self._within.append(0.0)
        begin = time.process_time()
        try:
            return work()
        finally:
            took = time.process_time() - begin
            self.seconds[part] = self.seconds.get(part, 0.0) + took - self._within.pop()
            if self._within:
                self._within[-1] += took


SPLIT = (
    (EpochBatches, "__iter__", "index"),
    (CachedViews, "_groups", "index"),
    (kdcache.shards.ShardFiles, "read", "tar read"),
    (CachedViews, "_decode", "decode"),
    (Replay, "render", "render"),
    (Cache, "read_stored", "stored view"),
    (kdcache.join, "pixel_digest", "digest"),
    (kdcache.join, "is_checked", "digest"),
    (Cache, "read_pixel_digests", "digest"),
    (Cache, "read_replays", "params"),
    (Cache, "read_components", "target read"),
)
"""(owner, function, part of the work)."""


def measure_split(caches: Mapping[str, Cache], args: argparse.Namespace) -> None:
    """A line for each source, with logits and an int8 map: CPU µs a sample of each part, median of the rounds; the rest is putting batches together."""
    parts = [*dict.fromkeys(part for _, _, part in SPLIT), "rest", "hand-over"]
    print("split: CPU µs a sample of one worker, with logits and an int8 map")
    print(f"{'':<10}" + "".join(f"{part:>13}" for part in parts))
    for source, cache in caches.items():
        dataset = CachedViews(cache, targets=TARGETS["logits, int8 map"], check_views=0.05)
        batches = batches_of(cache, args)
        rounds: list[dict[str, float]] = []
        for epoch in range(args.rounds + 1):
            with ExitStack() as stack:
                watch = SplitClock()
                for owner, name, part in SPLIT:
                    watch.wrap(stack, owner, name, part)
                batches.set_epoch(epoch)
                count = 0

                def work() -> int:
                    return sum(len(dataset.__getitems__(items)["labels"]) for items in batches)  # noqa: B023 - called at once

                count = watch.timed("rest", work)
            rounds.append({part: 1e6 * seconds / count for part, seconds in watch.seconds.items()})
        medians = {part: statistics.median(one.get(part, 0.0) for one in rounds[1:]) for part in parts[:-1]}
        medians["hand-over"] = hand_over_us(dataset, batches, args)
        print(f"{source:<10}" + "".join(f"{medians[part]:13.1f}" for part in parts), flush=True)


def hand_over_us(dataset: CachedViews, batches: EpochBatches, args: argparse.Namespace) -> float:
    """CPU µs a sample of a worker process beyond the same epoch's in this one; both without warming up."""
    costs: dict[int, list[float]] = {0: [], 1: []}
    loaders = {workers: BatchLoader(dataset, batches, num_workers=workers) for workers in costs}
    for epoch in range(args.rounds + 1):
        for workers, loader in loaders.items():
            before = family_seconds()[workers]
            count = sum(len(batch["labels"]) for batch in loader.epoch(epoch))
            costs[workers].append(1e6 * (family_seconds()[workers] - before) / count)
    for loader in loaders.values():
        loader.close()
    return statistics.median(costs[1][1:]) - statistics.median(costs[0][1:])


# --- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(caches: Mapping[str, Cache], _args: argparse.Namespace) -> None:
    """A line for each budget: shared memory of the batches that wait, of what is allowed, and the one that the loop has besides."""
    cache = caches["raw"]
    dataset = CachedViews(cache, targets=TARGETS["logits, int8 map"], check_views=0.0)
    batches = EpochBatches(np.tile(np.arange(len(dataset)), 64), batch_size=64, num_views=1, seed=0)
    size = 64 * dataset.row_bytes
    print(f"memory: batches of 64, {size / 1e6:.1f} MB each, 2 workers; MB in shared memory once it has stopped growing")
    for budget in (size, 2 * size, 4 * size, 6 * size, 1 << 30):
        loader = BatchLoader(dataset, batches, num_workers=2, prefetch_bytes=budget)
        epoch = loader.epoch(0)
        held = [next(epoch) for _ in range(1)]
        used = settled_bytes() - len(held) * size
        allowed = loader.num_workers * loader.prefetched * size
        print(
            f"--prefetch-bytes {budget / 1e6:7.1f} MB: {loader.num_workers} × {loader.prefetched} batches, {allowed / 1e6:6.1f} MB; found {used / 1e6:6.1f} MB",
            flush=True,
        )
        held.clear()
        loader.close()


def settled_bytes() -> float:
    """Shared memory that this process and its children hold, each piece once, once it has stopped growing. Of Linux."""
    last, now = -1.0, 0.0
    while now != last:
        time.sleep(2)
        pieces: dict[int, int] = {}
        for process in (psutil.Process(), *psutil.Process().children()):
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    if str(link.readlink()).startswith("/dev/shm/"):
                        pieces[link.stat().st_ino] = 512 * link.stat().st_blocks
        last, now = now, float(sum(pieces.values()))
    return now


if __name__ == "__main__":
    main()
