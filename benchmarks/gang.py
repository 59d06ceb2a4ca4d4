"""Four students in a gang against the same four trained one after another, and against their steps alone on batches in memory.

    OMP_NUM_THREADS=1 python benchmarks/gang.py
    OMP_NUM_THREADS=1 python benchmarks/gang.py --case student --samples 128 --rounds 3

Makes photographs of 500×375 pixels, a cache of 224-pixel views with dense logits of 1000 classes, and then, interleaved round by round, each in a
process of its own by train's own path: the gang; each student alone, as many loading processes each; the gang on batches that are in memory
already (its loader replaced by a list), which is what the students' own work costs. `--case loader`: students that cost next to nothing.
`--case student`: students that cost more than loading, where a gang can gain little.

Prints medians over the rounds of: seconds an epoch without the first (startup excluded), wall seconds of the processes (startup included), and CPU
seconds an epoch of the training process and of those that load, which busy neighbours change least: with a core each, an epoch takes the larger of
the two. Then the ratios, taken within each round.

Expected, before the first run, on two cores with one loading process: an image costs L = 1.6 ms to load, n = .2 ms to normalise, a small student
s = .1 to .2 ms. Loading and training have a core each, so alone max(L, n + s) = L an image and student, the gang max(L, n + 4s) = L: 3.7 to 4 × with
what starts and ends of epochs cost. By CPU time 4 (L + n + s) / (L + n + 4s) = 3.1 to 3.5. Against the steps in memory, (n + 4s) / L = .4 to .6:
the gang takes about twice the time of its students' own work.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from extract import make_shard  # the script beside this one
from timm.models import save_for_hf

import pipelines.training.gang
from kdcache.join import Batch, BatchLoader
from pipelines.extract import ExtractConfig, extract
from pipelines.train import TrainConfig, train_configs

Options = dict[str, Any]

STUDENTS: dict[str, list[tuple[str, Options, Options]]] = {
    "loader": [  # all with one mean and std, so that views are normalised once
        ("deit_tiny_patch16_224", {"patch_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}, {"method": "kd"}),
        ("deit3_small_patch16_224", {"patch_size": 56, "embed_dim": 16, "depth": 2, "num_heads": 2}, {"method": "dkd", "opt": "sgd"}),
        ("deit_tiny_patch16_224", {"patch_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3}, {"method": "nkd", "opt": "lamb"}),
        ("deit_tiny_distilled_patch16_224", {"patch_size": 56, "embed_dim": 32, "depth": 1, "num_heads": 2}, {"method": "wsld"}),
    ],
    "student": [
        ("vit_tiny_patch16_224", {"depth": 3}, {"method": "kd"}),
        ("vit_tiny_patch16_224", {"depth": 4}, {"method": "dkd", "opt": "sgd"}),
        ("deit_tiny_patch16_224", {"depth": 3}, {"method": "nkd", "opt": "lamb"}),
        ("vit_small_patch32_224", {"depth": 3}, {"method": "wsld"}),
    ],
}
"""Name, constructor arguments, options of the run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(STUDENTS), default="loader")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(json.loads(args.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_cache(root, args.samples)
        kinds: dict[str, list[list[int]]] = {"gang": [[0, 1, 2, 3]], "alone": [[0], [1], [2], [3]], "in memory": [[0, 1, 2, 3]]}
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for number in range(args.rounds):
            for kind, groups in kinds.items():
                parts = [run(root, args, kind, group, number) for group in groups]
                found[kind].append({name: sum(part[name] for part in parts) for name in parts[0]})
            shown = "  ".join(
                f"{kind}: {one[-1]['epoch']:.2f} s, {one[-1]['training']:.2f} + {one[-1]['loading']:.2f} CPU s" for kind, one in found.items()
            )
            print(f"round {number + 1}: {shown}", flush=True)
    report(args, found)


def make_cache(root: Path, samples: int) -> None:
    (root / "shards").mkdir()
    for number in range(2):
        make_shard(root / "shards" / f"bench-{number:04d}.tar", num_samples=samples // 2, seed=number)
    model_args = {"img_size": 224, "patch_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 1000}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **model_args), str(root / "teacher"), model_args=model_args, safe_serialization=True)
    extract(
        ExtractConfig(
            shards=str(root / "shards"), cache=str(root / "cache"), teacher=f"local-dir:{root / 'teacher'}", views=1, workers=2, device="cpu"
        )
    )


def run(root: Path, args: argparse.Namespace, kind: str, group: list[int], number: int) -> dict[str, float]:
    """One process: {"epoch", "training", "loading", "a core each": seconds an epoch without the first; "process": wall seconds of all of it}."""
    out = root / f"{kind}-{group[0]}-{number}"
    task = {"root": str(root), "out": str(out), "kind": kind, "group": group, "case": args.case}
    task |= {name: getattr(args, name) for name in ("batch_size", "workers", "epochs")}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(task)], check=True, capture_output=True, text=True, env=os.environ)
    return {**json.loads(done.stdout.splitlines()[-1]), "process": time.perf_counter() - begin}


class InMemory(BatchLoader):
    """The first batches that the loader gives, again and again, its workers at rest."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._batches_in_memory = list(super().epoch(0))
        super().close()

    def epoch(self, epoch: int, *, start: int = 0, until: int | None = None) -> Iterator[Batch]:
        yield from self._batches_in_memory[start:]


def child(task: Options) -> None:
    """Train a group of students as one gang and print what an epoch took, from one end of an epoch to the next."""
    torch.set_num_threads(1)
    if task["kind"] == "in memory":
        pipelines.training.gang.BatchLoader = InMemory  # type: ignore[misc]
    ends: list[tuple[float, float, float]] = []
    move = pipelines.training.gang._Bar.move

    def note(self: Any, epoch: int, step: int, *arguments: Any) -> None:
        if step == 0 and epoch > 0:
            ends.append((time.perf_counter(), *cpu_seconds()))
        move(self, epoch, step, *arguments)

    pipelines.training.gang._Bar.move = note  # type: ignore[method-assign]
    configs = [
        TrainConfig(
            cache=f"{task['root']}/cache", out=task["out"], students=(name,), model_kwargs=kwargs, epochs=task["epochs"] + 2, device="cpu",
            batch_size=task["batch_size"], workers=task["workers"], **options,
        )
        for name, kwargs, options in (STUDENTS[task["case"]][number] for number in task["group"])
    ]  # fmt: skip
    for entry in train_configs(configs, gang=len(configs)):
        assert entry["status"] == "done", entry
    wall, training, loading = ((last - first) / (len(ends) - 1) for first, last in zip(ends[0], ends[-1], strict=True))
    print(json.dumps({"epoch": wall, "training": training, "loading": loading, "a core each": max(training, loading / max(1, task["workers"]))}))


def cpu_seconds() -> tuple[float, float]:
    """Of this process, and of its workers, which are alive and so not among the children that resource counts."""
    import psutil

    own = resource.getrusage(resource.RUSAGE_SELF)
    children = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return own.ru_utime + own.ru_stime, sum(times.user + times.system for times in children)


def report(args: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    print(f"\ncase {args.case}: {args.samples} images, batches of {args.batch_size}, {args.workers} workers, {args.rounds} rounds, medians")
    columns = ("epoch", "training", "loading", "a core each", "process")
    print(f"{'seconds':12}" + "".join(f"{column:>13}" for column in columns))
    for kind, rounds in found.items():
        print(f"{kind:12}" + "".join(f"{statistics.median(one[column] for one in rounds):13.2f}" for column in columns))
    for over, what in (("alone", "one after another / gang"), ("in memory", "in memory / gang")):
        shown = []
        for name in ("epoch", "a core each", "process"):
            ratios = sorted(one[name] / ours[name] for one, ours in zip(found[over], found["gang"], strict=True))
            shown.append(f"{name} {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"{what}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
