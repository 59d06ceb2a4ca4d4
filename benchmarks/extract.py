"""Extraction against the bare teacher forward on the same views in memory, in one run.

    OMP_NUM_THREADS=2 python benchmarks/extract.py --teacher vit_small_patch16_224 --rounds 3

Makes shards of photograph-sized JPEGs (500×375), a randomly initialised teacher, and interleaves, round by round:

* bare: uint8 views in memory → normalise → forward, batch by batch, nothing else;
* extract: `pipelines.extract` of one shard into a new cache; only its work is timed, from the first render task to the last
  committed record, not the loading of the teacher, calibration and the accuracy check.

Prints views a second of each, their ratio, and medians. Budget (DESIGN §12): ratio ≥ 0.90 on a CPU for ViT-S and larger.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pipelines.extract
from kdcache.cache import open_cache
from kdcache.device import autocast, resolve_device
from kdcache.teacher import load_teacher
from pipelines.extract import ExtractConfig, extract


def make_shard(path: Path, *, num_samples: int, seed: int) -> None:
    """JPEGs of 500×375 pixels with the spectrum of photographs, about 60 kB each."""
    random = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(num_samples):
            coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
            noisy = np.clip(np.asarray(coarse, np.int16) + random.normal(0, 12, (375, 500, 3)).astype(np.int16), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
            for extension, data in (("jpg", buffer.getvalue()), ("cls", str(i % 1000).encode())):
                info = tarfile.TarInfo(f"s{i:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="vit_small_patch16_224")
    parser.add_argument("--target", action="append", help="default: logits and features@norm:int8")
    parser.add_argument("--samples", type=int, default=96, help="of the shard")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    targets = tuple(args.target or ("logits", "features@norm:int8"))

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "shards").mkdir()
        for shard in range(1):
            make_shard(root / "shards" / f"bench-{shard:04d}.tar", num_samples=args.samples, seed=shard)
        checkpoint = root / "teacher.pth"
        import timm

        torch.manual_seed(0)
        torch.save(timm.create_model(args.teacher).state_dict(), checkpoint)
        teacher = load_teacher(args.teacher, checkpoint=checkpoint, precision=args.precision, device=resolve_device(args.device))

        work = pipelines.extract._Run._work
        seconds = 0.0

        def timed_work(run: pipelines.extract._Run, bar: object) -> None:
            nonlocal seconds
            begin = time.perf_counter()
            work(run, bar)
            seconds = time.perf_counter() - begin

        pipelines.extract._Run._work = timed_work  # type: ignore[method-assign]

        def run_extract(name: str) -> float:
            extract(
                ExtractConfig(
                    shards=str(root / "shards"), cache=str(root / name), teacher=args.teacher, checkpoint=str(checkpoint), targets=targets,
                    views=args.views, batch_size=args.batch_size, workers=args.workers, device=args.device, precision=args.precision,
                )
            )  # fmt: skip
            return seconds

        run_extract("warm-up")
        cache = open_cache(root / "warm-up")
        shard = cache.shards[0]
        pixels = torch.from_numpy(np.stack([cache.view(shard, key, view) for key in cache.keys(shard) for view in range(args.views)]))

        def run_bare() -> float:
            begin = time.perf_counter()
            with torch.inference_mode(), autocast(teacher.device, args.precision):
                for start in range(0, len(pixels), args.batch_size):
                    teacher.model(teacher.normalize(pixels[start : start + args.batch_size].to(teacher.device))).cpu()
            return time.perf_counter() - begin

        run_bare()
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {teacher.device}, {args.teacher}, {args.precision}, {', '.join(targets)}"
        )
        print(f"{'round':>5} {'bare views/s':>13} {'extract views/s':>16} {'ratio':>6}")
        ratios = []
        for number in range(args.rounds):
            before = run_bare()
            extracted = len(pixels) / run_extract(f"cache-{number}")
            bare = len(pixels) / ((before + run_bare()) / 2)
            ratios.append(extracted / bare)
            print(f"{number:5d} {bare:13.2f} {extracted:16.2f} {ratios[-1]:6.3f}")
        print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
