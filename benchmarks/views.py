"""What an image costs stage two: rendered from its tar by each decoder and resizer, or read from a cache that stores its views.

    OMP_NUM_THREADS=1 python benchmarks/views.py --samples 64 --rounds 15

Makes JPEGs of 500×375 pixels with the spectrum of photographs and a cache of 224-pixel views by each decoder and resizer and in each codec,
and then, in one thread and with warm files, loads the same rows and views in a drawn order through `CachedViews` from each in turn. Prints bytes a
view, and medians over the rounds of the thread's own ms a view, without and with the check of every pixel digest; for each codec also what
encoding costs at extraction. At last samples/s of `BatchLoader` with its workers and the targets of a small teacher, by the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from extract import make_shard  # the script beside this one
from timm.models import save_for_hf

from kdcache.join import BatchLoader, CachedViews, EpochBatches
from kdcache.opening import open_cache
from kdcache.stored_views import encode_view
from pipelines.extract import ExtractConfig, extract
from pipelines.inspect import inspect_cache

CODECS = ("jpeg95", "png", "raw")
RENDERED = {
    "pillow": {},
    "simplejpeg": {"decoder": "simplejpeg"},
    "torch": {"resizer": "torch"},
    "both": {"decoder": "simplejpeg", "resizer": "torch"},
}
"""Name of a cache → the options that its views are rendered with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "shards").mkdir()
        make_shard(root / "shards" / "bench-0000.tar", num_samples=args.samples, seed=0)
        model_args = {"img_size": 224, "patch_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10}
        save_for_hf(timm.create_model("vit_tiny_patch16_224", **model_args), str(root / "teacher"), model_args=model_args, safe_serialization=True)
        names: dict[str, dict[str, str]] = {**RENDERED, **{codec: {"store_views": codec} for codec in CODECS}}
        for name, options in names.items():
            extract(
                ExtractConfig(
                    shards=str(root / "shards"), cache=str(root / name), teacher=f"local-dir:{root / 'teacher'}", views=args.views, workers=0,
                    device="cpu", **options,  # type: ignore[arg-type]
                )
            )  # fmt: skip
        caches = {name: open_cache(root / name) for name in names}
        sets = {(name, check): CachedViews(cache, check_views=check) for name, cache in caches.items() for check in (0.0, 1.0)}
        times: dict[tuple[str, float], list[float]] = {key: [] for key in sets}
        encoding: dict[str, list[float]] = {codec: [] for codec in CODECS}
        random = np.random.default_rng(0)
        for number in range(args.rounds + 1):
            view = number % args.views
            items = [(int(row), view) for row in random.permutation(args.samples)[: args.batch_size]]
            for key, dataset in sets.items():
                begin = time.thread_time()
                dataset.__getitems__(items)
                times[key].append(1e3 * (time.thread_time() - begin) / len(items))
            pixels = sets["raw", 0.0].__getitems__(items)["views"].numpy()
            for codec in CODECS:
                begin = time.thread_time()
                for one in pixels:
                    encode_view(codec, one)  # type: ignore[arg-type]
                encoding[codec].append(1e3 * (time.thread_time() - begin) / len(items))
        print(f"{args.samples} images, {args.views} views of 224 px, batches of {len(items)}, {args.rounds} rounds, medians; one thread")
        print(f"{'views from':>10} {'bytes a view':>13} {'ms a view':>10} {'all checked':>12} {'ms to encode':>13}")
        for name, cache in caches.items():
            stored = inspect_cache(cache)["stored_views"]
            size = stored["bytes_per_view"] if stored else float((cache.rows.size / args.views).mean())
            cost, checked = (statistics.median(times[name, check][1:]) for check in (0.0, 1.0))
            encoded = f"{statistics.median(encoding[name][1:]):13.2f}" if name in encoding else f"{'':>13}"
            print(f"{name:>10} {size:13,.0f} {cost:10.3f} {checked:12.3f} {encoded}".rstrip())
        print(f"{', '.join(RENDERED)} (decoder, resizer): the image's bytes in its tar, over its views")
        speeds: dict[str, list[float]] = {name: [] for name in names}
        loaders = {
            name: BatchLoader(
                CachedViews(cache, targets=("logits",), check_views=0.05),
                EpochBatches(range(len(cache.rows)), batch_size=args.batch_size, num_views=args.views, seed=0),
                num_workers=args.workers,
            )
            for name, cache in caches.items()
        }
        for epoch in range(args.rounds + 1):
            for name, loader in loaders.items():
                begin = time.perf_counter()
                count = sum(len(batch["labels"]) for batch in loader.epoch(epoch))
                speeds[name].append(count / (time.perf_counter() - begin))
        for loader in loaders.values():
            loader.close()
        shown = ", ".join(f"{name} {statistics.median(values[1:]):,.0f}" for name, values in speeds.items())
        print(f"BatchLoader, {args.workers} workers, logits, 5 % of the views checked, samples/s: {shown}")


if __name__ == "__main__":
    main()
