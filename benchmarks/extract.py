"""Extraction against the bare teacher forward on the same views in memory, in one run, with the time split by stage.

    OMP_NUM_THREADS=2 python benchmarks/extract.py
    OMP_NUM_THREADS=2 python benchmarks/extract.py --teacher vit_base_patch16_224 --samples 48 --rounds 2
    python benchmarks/extract.py --device cuda --precision bf16 --teacher vit_large_patch16_224 --batch-size 128 --samples 1024 --workers 8

Makes a shard of photograph-sized JPEGs (500×375), a randomly initialised teacher, and interleaves, round by round:

* bare: uint8 views in memory → normalise → forward, batch by batch, nothing else;
* extract: `pipelines.extract` of the shard into a new cache; only its work is timed, from the first render task to the last
  committed record, not the loading of the teacher, calibration and the accuracy check.

Prints views a second of each, their ratio, and the median. Budget (DESIGN §12): ratio ≥ 0.90 on a CPU for ViT-S and larger, ≥ 0.95 on a
GPU. Then one more extraction with a clock around each stage of the main thread, and what the helpers (decode workers, compression threads)
need of a core. With --variants: the bare forward in channels_last and under torch.compile, to see whether either would pay.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import kdcache.arrays
import kdcache.rendering
import pipelines.extract
from kdcache.commit import GroupWriter
from kdcache.device import HostCopies, autocast, resolve_device
from kdcache.encodings import ENCODINGS
from kdcache.fidelity import Fidelity
from kdcache.opening import open_cache
from kdcache.rendering import Renderer, RenderTask, samples_per_task
from kdcache.shards import scan_shard
from kdcache.sources import resolve_shards
from kdcache.teacher import Teacher, load_teacher
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


class StageClock:
    """Adds up the time that the main thread spends in each stage, and the CPU time of the compression threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # so that each stage is charged with its own kernels; only in this extra run
        return time.perf_counter()

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begin = self._now()
            try:
                return function(*args, **options)
            finally:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - begin

        return call

    def _compressed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = time.thread_time()
            result = function(*args)
            name = "(threads) compression"
            self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - begin
            return result

        return call

    def _blocks(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def call(*args: Any, **options: Any) -> Iterator[Any]:
            blocks = function(*args, **options)
            stage = "wait for the first block"
            while True:
                begin = time.perf_counter()
                block = next(blocks, None)
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
                if block is None:
                    return
                stage = "wait for later blocks"
                yield block

        return call

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Clocks on every stage while this lasts."""
        stages = [(Teacher, "__call__", "copy to the device, normalise, forward"), (Fidelity, "measure", "fidelity: figures")]
        stages += [(HostCopies, "__init__", "copy to the host")]
        stages += [(GroupWriter, "append", "cut into chunks, queue"), (pipelines.extract._Run, "_settle", "wait for the commit")]
        for encodings in ENCODINGS.values():
            for encoding in encodings.values():
                stages += [(encoding, "encode", "encode"), (encoding, "decode", "fidelity: decode")]
        saved = [(owner, name, getattr(owner, name)) for owner, name, _ in stages]
        saved += [
            (kdcache.arrays, "encode_chunk", kdcache.arrays.encode_chunk),
            (kdcache.rendering, "rendered_blocks", kdcache.rendering.rendered_blocks),
        ]
        for owner, name, stage in stages:
            setattr(owner, name, self._timed(stage, getattr(owner, name)))
        kdcache.arrays.encode_chunk = self._compressed(kdcache.arrays.encode_chunk)
        kdcache.rendering.rendered_blocks = self._blocks(kdcache.rendering.rendered_blocks)
        try:
            yield
        finally:
            for owner, name, function in saved:
                setattr(owner, name, function)


def render_seconds(shards: str, cache: Any, views: int) -> float:
    """CPU time of decoding and rendering the shard in this process."""
    index = scan_shard(resolve_shards(shards)[0])
    renderer, samples = Renderer(cache.plan), list(enumerate(index.samples))
    step = samples_per_task(cache.plan, views)
    begin = time.process_time()
    for start in range(0, len(samples), step):
        renderer[RenderTask(0, index.source, tuple(samples[start : start + step]), tuple(range(views)), False)]
    return time.process_time() - begin


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
    parser.add_argument("--variants", action="store_true", help="time the bare forward in channels_last and under torch.compile too")
    args = parser.parse_args()
    targets = tuple(args.target or ("logits", "features@norm:int8"))

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "shards").mkdir()
        make_shard(root / "shards" / "bench-0000.tar", num_samples=args.samples, seed=0)
        checkpoint = root / "teacher.pth"
        import timm

        torch.manual_seed(0)
        torch.save(timm.create_model(args.teacher).state_dict(), checkpoint)
        teacher = load_teacher(args.teacher, checkpoint=checkpoint, precision=args.precision, device=resolve_device(args.device))

        work = pipelines.extract._Run._work
        seconds = 0.0
        clock: StageClock | None = None

        def timed_work(run: pipelines.extract._Run, bar: object) -> None:
            nonlocal seconds
            with clock.installed() if clock is not None else contextlib.nullcontext():
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

        if teacher.device.type == "cuda":
            pixels = pixels.pin_memory()

        def run_bare(forward: Callable[[torch.Tensor], torch.Tensor] = teacher.model) -> float:
            begin = time.perf_counter()
            with torch.inference_mode(), autocast(teacher.device, args.precision):
                for start in range(0, len(pixels), args.batch_size):
                    last = forward(teacher.normalize(pixels[start : start + args.batch_size].to(teacher.device, non_blocking=True)))
                last.cpu()  # a GPU is given every batch before the host waits
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

        clock = StageClock(teacher.device)
        total = run_extract("split")
        main_thread = {stage: spent for stage, spent in clock.seconds.items() if not stage.startswith("(")}
        main_thread["everything else"] = total - sum(main_thread.values())
        print(f"\n{'main thread':40s} {'ms a view':>9} {'share':>6}")
        for stage, spent in sorted(main_thread.items(), key=lambda item: -item[1]):
            print(f"{stage:40s} {1e3 * spent / len(pixels):9.3f} {100 * spent / total:5.1f} %")
        print("beside it, CPU time:")
        helpers = {
            "decode and render (workers)": render_seconds(str(root / "shards"), cache, args.views),
            "compression (threads)": clock.seconds["(threads) compression"],
        }
        for helper, spent in helpers.items():
            print(f"{helper:40s} {1e3 * spent / len(pixels):9.3f} {100 * spent / total:5.1f} % of a core")

        if args.variants:
            eager = run_bare()
            teacher.model.to(memory_format=torch.channels_last)
            print(f"\nbare in channels_last: {eager / run_bare():.3f} x")
            teacher.model.to(memory_format=torch.contiguous_format)
            compiled = torch.compile(teacher.model)
            run_bare(compiled)  # compiles, the last batch's shape too
            print(f"bare under torch.compile: {run_bare() / run_bare(compiled):.3f} x")


if __name__ == "__main__":
    main()
