"""Caches made, compared and damaged, for the tests of both stages: extraction with small defaults, digests of what lies there, a byte changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from kdcache.cache import Cache
from kdcache.join import CachedViews
from kdcache.opening import open_cache
from kdcache.plan import POLICIES, MixedViews
from pipelines.extract import ExtractConfig, ExtractSummary, extract
from pipelines.verify import verify

FEATURES = "features@blocks.-1:int8"


def run(tmp_path: Path, cache: str = "cache", **options: Any) -> ExtractSummary:
    """Extract with small defaults: 2 views of 32 pixels, one process."""
    given: dict[str, Any] = {"shards": str(tmp_path / "shards"), "cache": str(tmp_path / cache), "teacher": f"local-dir:{tmp_path / 'teacher'}"}
    given |= {"views": 2, "workers": 0, "batch_size": 5, "device": "cpu"}
    return extract(ExtractConfig(**{**given, **options}))


def tree(folder: Path) -> dict[str, str]:
    """Path → digest of every file of a cache."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def groups(folder: Path) -> dict[str, str]:
    """As `tree`, without the JSON documents, whose provenance names times and versions."""
    return {path: digest for path, digest in tree(folder).items() if ".zarr/" in path}


def replay(cache: Any, teacher_dir: Path, shard: str, keys: list[str], view: int) -> dict[str, torch.Tensor]:
    """What the teacher gives for these views now, by timm alone: no code of ours between the pixels and the values."""
    model = timm.create_model(f"local-dir:{teacher_dir}", pretrained=True).eval()
    pixels = torch.from_numpy(np.stack([cache.view(shard, key, view) for key in keys]))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    x = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.inference_mode():
        final, (block,) = model.forward_intermediates(x, indices=[1], norm=False, output_fmt="NLC")
        return {"logits": model(x), "block": block, "norm": final}


def flip(path: Path, position: int = -1) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position < 0 else position] ^= 0x10
    path.write_bytes(data)


def one(folder: Path, pattern: str) -> Path:
    return next(iter(sorted(folder.glob(pattern))))


def read_everything(folder: Path) -> list[bytes]:
    """Every label, parameter and component of a cache, as training reads them."""
    with open_cache(folder) as cache:
        found = [cache.rows.label.tobytes(), cache.rows.offset.tobytes()]
        for shard in cache.shards:
            rows = range(len(cache.keys(shard)))
            for view in range(cache.num_views):
                found += [params.to_row().tobytes() for params in cache.read_params(shard, view, rows)]
                found.append(cache.read_pixel_digests(shard, view, rows).tobytes())
                for name, layer in cache.teachers.items():
                    for target in layer.targets:
                        found += [part.tobytes() for part in cache.read_components(name, target, shard, view, rows).values()]
    return found


BLOCK = "features@blocks.0"


NORM = "features@norm"


def record(setup: Path, cache: str, targets: tuple[str, ...], views: int, **options: Any) -> ExtractSummary:
    """Extract with one view a batch, so that a segment of fewer views is made of the same passes and hence the same bytes."""
    specs = {BLOCK: f"{BLOCK}:fp16", NORM: f"{NORM}:int8"}
    return run(setup, cache, targets=tuple(specs.get(target, target) for target in targets), views=views, batch_size=1, **options)


def stored(folder: Path) -> dict[str, str]:
    """Path → digest of the groups and calibration files of a cache."""
    return {path: digest for path, digest in tree(folder).items() if ".zarr/" in path or path.endswith(".safetensors")}


KILLED = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from kdcache.store import LocalStore
from pipelines.verify import verify

os.fsync = lambda descriptor: None  # a killed process loses nothing that the kernel has; only a crash of the machine would

def killed_at(moment, action):
    \"\"\"Run `action` in a child that kills itself at its moment-th change of the store, before or after it in turn; whether it did.\"\"\"
    pid = os.fork()
    if pid == 0:
        numbers = itertools.count(1)  # several threads count
        def counted(change):
            def wrapped(*args):
                is_the_one = next(numbers) == moment // 2
                if is_the_one and moment % 2: os.kill(os.getpid(), signal.SIGKILL)
                done = change(*args)
                if is_the_one: os.kill(os.getpid(), signal.SIGKILL)
                return done
            return wrapped
        LocalStore.put_new, LocalStore.delete = counted(LocalStore.put_new), counted(LocalStore.delete)
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
"""
"""For a script of its own without threads: fork is then safe, and a moment costs milliseconds."""


MIX = MixedViews(prob=0.7, mixup_alpha=0.8, cutmix_alpha=1.0)


MIXED = POLICIES["strong"].model_copy(update={"mix": MIX})


def check_every_way_to_a_view(cache: Cache) -> None:
    items = [(number, view) for number in range(len(cache.rows)) for view in range(cache.num_views)]
    batch = CachedViews(cache, check_views=1.0).__getitems__(items)
    for place, (number, view) in enumerate(items):
        shard = cache.rows.shards[cache.rows.shard[number]]
        key = cache.keys(shard)[cache.rows.row[number]]
        np.testing.assert_array_equal(batch["views"][place].numpy(), cache.view(shard, key, view))
    verdict = verify(str(cache.store.url.removeprefix("file://")), views="all", workers=0)
    assert (verdict.problems, verdict.views_replayed) == ([], len(items))
