"""`verify` over plainly reading the files of a cache: MB/s, in one run.

    OMP_NUM_THREADS=1 python benchmarks/verify.py

A cache of stored raw views (151 kB each, what weighs most in a cache) is extracted once with a tiny teacher. Then, in turn, round after round:

* read: every file with `pread` in pieces of 1 MiB, nothing else, on one thread and on as many as verify uses;
* hash: the same, each file through BLAKE2b: the limit of what proves a byte;
* verify: all that `kdcache verify` does without --views, from the empty process's point of view: documents, files, index, pixel columns.

Warm: the page cache holds the files. Cold: `posix_fadvise(DONTNEED)` before each, which the kernel need not obey; the storage then sets the pace. Wall time,
medians over rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
from PIL import Image
from timm.models import save_for_hf

from kdcache.digests import READ_BYTES
from pipelines.extract import ExtractConfig, extract
from pipelines.verify import verify

TEACHER_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def make_cache(folder: Path, *, num_shards: int, num_samples: int, views: int) -> Path:
    noise = np.random.default_rng(0)
    (folder / "shards").mkdir()
    for shard in range(num_shards):
        with tarfile.open(folder / "shards" / f"bench-{shard:04d}.tar", "w") as tar:
            for i in range(num_samples):
                image = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                image.save(buffer, "JPEG")
                info = tarfile.TarInfo(f"s{i:05d}.jpg")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **TEACHER_ARGS)
    save_for_hf(model, str(folder / "teacher"), safe_serialization=True, model_args=TEACHER_ARGS)
    extract(
        ExtractConfig(
            shards=str(folder / "shards"), cache=str(folder / "cache"), teacher=f"local-dir:{folder / 'teacher'}", size=224, views=views,
            store_views="raw", device="cpu",
        )
    )  # fmt: skip
    return folder / "cache"


def read_all(files: list[Path], *, threads: int, hashed: bool) -> None:
    def read(path: Path) -> None:
        digest = hashlib.blake2b(digest_size=16)
        descriptor = os.open(path, os.O_RDONLY)
        offset = 0
        while data := os.pread(descriptor, READ_BYTES, offset):
            offset += len(data)
            if hashed:
                digest.update(data)
        os.close(descriptor)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, files))


def forget(files: list[Path]) -> None:
    """Ask the kernel to drop the files from its page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        cache = make_cache(Path(name), num_shards=options.shards, num_samples=options.samples, views=options.views)
        files = [path for path in sorted(cache.rglob("*")) if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        threads = min(8, os.cpu_count() or 1)
        ways: dict[str, Callable[[], object]] = {
            "read, 1 thread": lambda: read_all(files, threads=1, hashed=False),
            f"read, {threads} threads": lambda: read_all(files, threads=threads, hashed=False),
            "hash, 1 thread": lambda: read_all(files, threads=1, hashed=True),
            f"hash, {threads} threads": lambda: read_all(files, threads=threads, hashed=True),
            "verify": lambda: verify(str(cache)),
        }
        assert verify(str(cache)).ok
        print(f"{len(files)} files, {size / 1e6:.0f} MB")
        for temperature in ("warm", "cold"):
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, action in ways.items():
                    if temperature == "cold":
                        forget(files)
                    begin = time.perf_counter()
                    action()
                    seconds[way].append(time.perf_counter() - begin)
            for way, times in seconds.items():
                print(f"{temperature}  {way:<16} {size / 1e6 / statistics.median(times):8.0f} MB/s")


if __name__ == "__main__":
    main()
