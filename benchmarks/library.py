"""What torch's DataLoader and webdataset's pipeline cost over a cache, against our own loop's BatchLoader.

    OMP_NUM_THREADS=1 python benchmarks/library.py --samples 256 --rounds 7

Makes JPEGs of 500×375 pixels, and caches of 224-pixel views from a teacher with 196 tokens of 384 channels: one whose views are rendered, one
that stores them raw, where all else shows. Then, interleaved and with warm files, an epoch each of: BatchLoader; DataLoader over CachedDataset,
whose collation copies each sample into the batch; the same with `decode=True`; webdataset with `CachedDataset.join` and torch's collation.
Prints medians over the rounds of ms a sample, and ratios to BatchLoader's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import webdataset as wds
from extract import make_shard  # the script beside this one
from timm.models import save_for_hf
from torch.utils.data import DataLoader

from kdcache.dataset import CachedDataset
from kdcache.join import BatchLoader, CachedViews, EpochBatches
from kdcache.opening import open_cache
from pipelines.extract import ExtractConfig, extract


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "shards").mkdir()
        for number in range(2):
            make_shard(root / "shards" / f"bench-{number:04d}.tar", num_samples=args.samples // 2, seed=number)
        model_args = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 1, "num_heads": 6, "num_classes": 1000}
        save_for_hf(timm.create_model("vit_tiny_patch16_224", **model_args), str(root / "teacher"), model_args=model_args, safe_serialization=True)
        print(f"{args.samples} views of 224 px, batches of {args.batch_size}, {args.rounds} rounds, medians of ms a sample (ratio to BatchLoader)")
        for views in ("rendered", "raw"):
            extract(
                ExtractConfig(
                    shards=str(root / "shards"), cache=str(root / views), teacher=f"local-dir:{root / 'teacher'}", targets=("logits", "features@norm"),
                    views=1, workers=0, device="cpu", store_views="raw" if views == "raw" else None,
                )
            )  # fmt: skip
            for targets in (("logits",), ("logits", "features@norm")):
                for workers in args.workers:
                    measure(root, views, targets, workers, args)


def measure(root: Path, views: str, targets: tuple[str, ...], workers: int, args: argparse.Namespace) -> None:
    """One line a loader."""
    cache = open_cache(root / views)
    options: dict[str, Any] = {"batch_size": args.batch_size, "num_workers": workers, "persistent_workers": workers > 0}
    rows = len(cache.rows)
    ours = BatchLoader(
        CachedViews(cache, targets=targets, check_views=0.05),
        EpochBatches(range(rows), batch_size=args.batch_size, num_views=1, seed=0),
        num_workers=workers,
    )
    plain, decoding = (CachedDataset(cache, targets, decode=decode) for decode in (False, True))
    urls = [str(path) for path in sorted((root / "shards").glob("*.tar"))]
    pipeline = wds.WebDataset(urls, shardshuffle=False).shuffle(100).compose(plain.join).to_tuple("jpg", "label", "targets")
    theirs: dict[str, DataLoader[Any]] = {
        "CachedDataset": DataLoader(plain, shuffle=True, **options),
        "decode=True": DataLoader(decoding, shuffle=True, **options),
        "webdataset": DataLoader(pipeline, **options),
    }
    loaders: dict[str, Callable[[int], Iterable[Any]]] = {"BatchLoader": ours.epoch}
    loaders |= {name: partial(_same, loader) for name, loader in theirs.items()}
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for epoch in range(args.rounds + 1):
        for name, batches in loaders.items():
            begin = time.perf_counter()
            count = sum(len(batch["labels"] if isinstance(batch, dict) else batch[1]) for batch in batches(epoch))
            times[name].append(1e3 * (time.perf_counter() - begin) / count)
    ours.close()
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    shown = "  ".join(f"{name} {value:.3f} ({value / medians['BatchLoader']:.2f})" for name, value in medians.items())
    print(f"views {views}, {'+'.join(targets)}, {workers} workers: {shown}", flush=True)


def _same(loader: DataLoader[Any], _epoch: int) -> DataLoader[Any]:
    return loader


if __name__ == "__main__":
    main()
