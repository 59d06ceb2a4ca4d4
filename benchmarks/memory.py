"""Peak memory of both stages at 1 × and 10 × the number of shards, and at 1 × and 10 × the size of a shard; of train by --prefetch-bytes.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--stages extract,train,prefetch]

Each run is `kdcache extract` or `kdcache train` in processes of their own, with two workers; its peak is the largest sum of the
processes' proportional set sizes (PSS: a page that n processes share counts 1/n in each; RSS where the system has no PSS) and of the shared
memory that is under way between them, sampled 20 times a second. Shards hold tiny images and the models
are tiny, so that what the number of samples costs is not hidden by what a model costs.
Prints medians over rounds (one peak moves by some percent, with the moment at which workers start), ratios to 1 ×, and the growth a sample.
Budget (DESIGN §12): independent of the number and size of shards; what a training run must know of every row (its place, its label,
the order of an epoch) is some 100 bytes.

`prefetch` trains on views of 128 pixels, with --prefetch-bytes at room for 2 batches and for 8: the peaks should differ by no more than 6 batches,
and by most of them, since the student is slower than its loader.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

MODEL_ARGS = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 10}
PREFETCH_VIEW_SIZE, PREFETCH_BATCH_SIZE, PREFETCH_BATCHES, PREFETCH_STEPS = 128, 256, (2, 8), 12
NOISE = 1.05
"""A ratio that counts as the same."""


def make_shards(folder: Path, *, shards: int, samples: int) -> None:
    """Tars of images of 24×24 pixels with labels."""
    folder.mkdir()
    images: list[bytes] = []
    for seed in range(16):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    for shard in range(shards):
        with tarfile.open(folder / f"bench-{shard:04d}.tar", "w") as tar:
            for i in range(samples):
                for extension, data in (("jpg", images[i % 16]), ("cls", str(i % 10).encode())):
                    info = tarfile.TarInfo(f"{shard:04d}_{i:08d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def _bytes_of(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
    except psutil.Error:  # it has just ended
        return 0
    return int(getattr(info, "pss", 0) or info.rss)


def _waiting_bytes(family: Sequence[psutil.Process]) -> int:
    """Of batches on their way from one process to another: open in a worker and mapped nowhere, hence in no process's PSS. 0 without /proc."""
    sizes: dict[int, int] = {}
    mapped: set[int] = set()
    for process in family:
        try:
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                if "/torch_" in os.readlink(descriptor):
                    status = os.stat(descriptor)
                    sizes[status.st_ino] = 512 * status.st_blocks
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:  # it has just ended
            continue
        mapped |= {int(line.split()[4]) for line in maps.splitlines() if "/torch_" in line}
    return sum(size for inode, size in sizes.items() if inode not in mapped)


def peak_bytes(command: Sequence[str]) -> int:
    """Peak PSS of the process and its children, with what is under way between them. Raises if the command fails."""
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        peak = 0
        while process.poll() is None:
            try:
                family = [process, *process.children(recursive=True)]
            except psutil.Error:
                break
            peak = max(peak, sum(_bytes_of(one) for one in family) + _waiting_bytes(family))
            time.sleep(0.05)
        if process.wait():
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{log.read().decode()}")
    return peak


def measure_prefetch(extract: Sequence[str], train: Sequence[str], root: Path, common: Sequence[str], *, rounds: int) -> None:
    """Print the peaks of a run by the room for batches that are under way, and what they differ by."""
    size, batch_size = PREFETCH_VIEW_SIZE, PREFETCH_BATCH_SIZE
    cache = str(root / "cache-prefetch")
    make_shards(root / "prefetch", shards=2, samples=PREFETCH_STEPS * batch_size // 2)
    options = ["--teacher", f"local-dir:{root / 'teacher'}", "--views", "1", "--size", str(size)]
    subprocess.run([*extract, str(root / "prefetch"), cache, *options, *common], check=True, capture_output=True)
    batch_bytes = batch_size * (3 * size * size + 64)  # a row's logits and labels take less than that
    peaks: dict[int, list[float]] = {batches: [] for batches in PREFETCH_BATCHES}
    for number in range(rounds):
        for batches, found in peaks.items():
            options = ["--student", "test_vit", "--epochs", "1", "--batch-size", str(batch_size), "--prefetch-bytes", str(batches * batch_bytes)]
            found.append(peak_bytes([*train, cache, *options, "--out", str(root / f"runs-prefetch-{batches}-{number}"), *common]))
    medians = {batches: statistics.median(values) for batches, values in peaks.items()}
    few, many = medians
    differ = (many - few) * batch_bytes
    print(f"train, views of {size} px, batches of {batch_size} ({batch_bytes / 1e6:.1f} MB)")
    for batches, median in medians.items():
        spread = f"{min(peaks[batches]) / 1e6:.0f} to {max(peaks[batches]) / 1e6:.0f}"
        print(f"  --prefetch-bytes {batches * batch_bytes / 1e6:.0f} MB, {batches} batches: {median / 1e6:.0f} MB ({spread})")
    print(
        f"  differ by {(medians[many] - medians[few]) / 1e6:.0f} MB, {(medians[many] - medians[few]) / differ:.2f} of the {differ / 1e6:.0f} MB between them"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--samples", type=int, default=400, help="of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stages", default="extract,train,prefetch", help="which, with commas; train needs the caches of extract")
    args = parser.parse_args()
    kdcache = [sys.executable, "-c", "from cli.main import main; main()"]
    with tempfile.TemporaryDirectory() as folder:
        import timm
        from timm.models import save_for_hf

        root = Path(folder)
        save_for_hf(timm.create_model("vit_tiny_patch16_224", **MODEL_ARGS), str(root / "teacher"), model_args=MODEL_ARGS, safe_serialization=True)
        print(f"{args.shards} shards of {args.samples} samples; {args.workers} workers; peak PSS of all processes")
        wanted = args.stages.split(",")
        sizes = {"1": (args.shards, args.samples), "shards": (10 * args.shards, args.samples), "size": (args.shards, 10 * args.samples)}
        for name, (shards, samples) in sizes.items() if {"extract", "train"} & {*wanted} else ():
            make_shards(root / name, shards=shards, samples=samples)
        common = ["-j", str(args.workers), "--device", "cpu"]
        stages = {
            "extract": ["--teacher", f"local-dir:{root / 'teacher'}", "--target", "logits", "--target", "features@norm", "--views", "2"],
            "train": ["--student", "test_vit", "--method", "kd", "--epochs", "1", "--batch-size", "256"],
        }
        if "prefetch" in wanted:
            measure_prefetch([*kdcache, "extract"], [*kdcache, "train"], root, common, rounds=args.rounds)
        if "extract" in wanted:
            print("| stage | 1 x | 10 x the shards | 10 x the shard size |")
            print("|---|---|---|---|")
        for stage, options in stages.items():
            if stage not in wanted:
                continue
            peaks: dict[str, list[float]] = {name: [] for name in sizes}
            for number in range(args.rounds):
                for name in sizes:
                    fresh = str(root / f"cache-{name}-{number}")
                    if stage == "extract":
                        command = [stage, str(root / name), fresh, *options]
                    else:
                        command = [stage, fresh, *options, "--out", str(root / f"runs-{name}-{number}")]
                    peaks[name].append(peak_bytes([*kdcache, *command, *common]))
            medians = {name: statistics.median(values) for name, values in peaks.items()}
            cells = [f"{medians['1'] / 1e6:.0f} MB ({min(peaks['1']) / 1e6:.0f} to {max(peaks['1']) / 1e6:.0f})"]
            for name in ("shards", "size"):
                growth = (medians[name] - medians["1"]) / (9 * args.shards * args.samples)
                ratio = medians[name] / medians["1"]
                cells.append(f"{medians[name] / 1e6:.0f} MB, {ratio:.3f} x ({'met' if ratio <= NOISE else 'not met'}), {growth:.0f} bytes a sample")
            print(f"| {stage} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
