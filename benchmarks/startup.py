"""How long a user waits when there is nothing to do: `kdcache --help`, and a finished extraction of 1,000 shards run again.

    python benchmarks/startup.py

Whole processes, medians of 5. Budgets (DESIGN §12): 0.3 s and 3 s.
"""

from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

KDCACHE = str(Path(sys.executable).parent / "kdcache")


def seconds(command: Sequence[str], *, repeat: int) -> float:
    """Median wall time of a whole process."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def make_shard(path: Path, seed: int) -> None:
    """One image of 32×32 pixels with a label."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    with tarfile.open(path, "w") as tar:
        for name, data in (("s.png", buffer.getvalue()), ("s.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    args = parser.parse_args()
    print(f"kdcache --help: {seconds([KDCACHE, '--help'], repeat=5):.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        import timm
        from timm.models import save_for_hf

        root = Path(folder)
        (root / "shards").mkdir()
        for shard in range(args.shards):
            make_shard(root / "shards" / f"bench-{shard:04d}.tar", shard)
        model_args = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10}
        save_for_hf(timm.create_model("vit_tiny_patch16_224", **model_args), str(root / "teacher"), model_args=model_args, safe_serialization=True)
        command = [
            KDCACHE,
            "extract",
            str(root / "shards"),
            str(root / "cache"),
            "--teacher",
            f"local-dir:{root / 'teacher'}",
            "--views",
            "1",
            "-j",
            "0",
        ]
        first = seconds(command, repeat=1)
        print(f"extract of {args.shards} shards of one image: {first:.1f} s, {1e3 * first / args.shards:.1f} ms a shard")
        print(f"the same again, finished: {seconds(command, repeat=5):.2f} s")
        print(f"inspect: {seconds([KDCACHE, 'inspect', str(root / 'cache')], repeat=5):.2f} s")


if __name__ == "__main__":
    main()
