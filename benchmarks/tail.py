"""What a student's process pays for a teacher's tail, against the teacher itself: seconds to build, peak memory, bytes on disk.

    OMP_NUM_THREADS=1 python benchmarks/tail.py
    OMP_NUM_THREADS=1 python benchmarks/tail.py --teacher eva_large_patch14_196 --img-size 224

A teacher with random weights is saved, and a cache made of it with `--for scalekd`. Then, each in fresh processes that have imported everything and
built a tiny model: open the cache and load its tail; build the whole teacher from its folder. Peak memory is how much the process's highest resident
size grew. Medians of `--rounds`.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from pipelines.extract import ExtractConfig, extract

_BEFORE = """
import json, resource, sys, time
import kdcache.methods, timm, torch
from kdcache.opening import open_cache
from kdcache.tail import load_tail
from kdcache.teacher import load_teacher
def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status") as file:  # Linux lets a process inherit its parent's ru_maxrss
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
timm.create_model("test_vit")
memory, begin = peak(), time.perf_counter()
"""
_AFTER = """
print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": peak() - memory}))
"""
_TAIL = """
cache = open_cache(sys.argv[1])
module = load_tail(cache.store, cache.layer(None))
"""
_TEACHER = """
module = load_teacher(sys.argv[1])
"""


def measured(code: str, argument: str, rounds: int) -> tuple[float, float]:
    """Median (seconds, bytes of memory) of a piece of code in fresh processes."""
    found = []
    for _ in range(rounds):
        result = subprocess.run([sys.executable, "-c", _BEFORE + code + _AFTER, argument], check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(result.stdout))
    return statistics.median(one["seconds"] for one in found), statistics.median(one["bytes"] for one in found)


def make_cache(folder: Path, teacher: str, model_args: dict[str, int]) -> None:
    """A teacher with random weights in folder/teacher, and folder/cache of two images, recorded for scalekd."""
    with tarfile.open(folder / "train-0000.tar", "w") as tar:
        for i in range(2):
            buffer = io.BytesIO()
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(buffer, "JPEG")
            for extension, data in (("jpg", buffer.getvalue()), ("cls", b"0")):
                info = tarfile.TarInfo(f"{i:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    torch.manual_seed(0)
    save_for_hf(timm.create_model(teacher, **model_args), str(folder / "teacher"), safe_serialization=True, model_args=model_args)
    extract(
        ExtractConfig(
            shards=str(folder / "train-0000.tar"), cache=str(folder / "cache"), teacher=f"local-dir:{folder / 'teacher'}", methods=("scalekd",),
            views=1, workers=0, device="cpu",
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="swin_large_patch4_window7_224")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_cache(folder, given.teacher, {} if given.img_size is None else {"img_size": given.img_size})
        on_disk = {
            "tail": next((folder / "cache" / "teachers").glob("*/tail.safetensors")).stat().st_size,
            "teacher": (folder / "teacher" / "model.safetensors").stat().st_size,
        }
        figures = {
            "tail": measured(_TAIL, str(folder / "cache"), given.rounds),
            "teacher": measured(_TEACHER, f"local-dir:{folder / 'teacher'}", given.rounds),
        }
    for what, (seconds, memory) in figures.items():
        print(f"{given.teacher}, {what:>7}: {on_disk[what] / 1e6:5.0f} MB on disk, {seconds:5.2f} s to build, {memory / 1e6:5.0f} MB of memory")


if __name__ == "__main__":
    main()
