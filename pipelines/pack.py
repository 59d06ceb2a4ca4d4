"""Before stage one: a folder of images → WebDataset shards in timm's ImageNet layout, byte for byte the same each time.

IMAGES is an ImageFolder: one sub-folder a class, classes numbered in sorted order. Each sample becomes three members,
`<key>.jpg` (the file as it is), `<key>.cls` and `<key>.json`; tar headers carry a fixed time and owner.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kdcache.errors import ShardError, StoreError, UsageError
from kdcache.images import IMAGE_EXTENSIONS


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What to pack and how."""

    images: str
    """ImageFolder: IMAGES/<class>/<file>."""
    out: str
    """Folder for the tars; made if it is not there."""
    name: str | None = None
    """Shards are called NAME-0000.tar, …. Default: the name of IMAGES."""
    samples_per_shard: int = 1251
    """ImageNet's 1,281,167 training images in 1,024 shards have this many."""
    shuffle_seed: int | None = 0
    """Order of samples over shards; None: sorted, class after class, which makes shards of one class each."""


@dataclass(frozen=True)
class PackSummary:
    """What was written."""

    shards: int
    samples: int
    classes: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"shards": self.shards, "samples": self.samples, "classes": self.classes, "bytes": self.bytes}


def pack(config: PackConfig, *, progress: bool = False) -> PackSummary:
    """Write the shards. Raises UsageError for an empty folder, StoreError if shards are there already or can't be written."""
    root = Path(config.images)
    if not root.is_dir():
        raise UsageError(f"images {config.images!r}: no such folder; expected one sub-folder of images a class")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    samples = [(path, label) for label, name in enumerate(classes) for path in _images(root / name)]
    if not samples:
        raise UsageError(
            f"images {config.images!r}: no {', '.join(IMAGE_EXTENSIONS)} file in {len(classes)} sub-folders; expected IMAGES/<class>/<file>"
        )
    if config.samples_per_shard < 1:
        raise UsageError(f"samples per shard must be at least 1, found {config.samples_per_shard}")
    if config.shuffle_seed is not None:
        random.Random(config.shuffle_seed).shuffle(samples)
    out = Path(config.out)
    name = config.name or root.resolve().name
    count = -(-len(samples) // config.samples_per_shard)
    width = max(4, len(str(count - 1)))
    total = 0
    with tqdm(total=len(samples), unit="image", desc="pack", disable=not progress) as bar:
        for shard in range(count):
            chosen = samples[shard * config.samples_per_shard : (shard + 1) * config.samples_per_shard]
            total += _write_shard(out / f"{name}-{shard:0{width}d}.tar", root, chosen, classes, bar)
    return PackSummary(shards=count, samples=len(samples), classes=len(classes), bytes=total)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file())


def _write_shard(path: Path, root: Path, samples: Sequence[tuple[Path, int]], classes: Sequence[str], bar: Any) -> int:
    from webdataset import TarWriter

    if path.exists():
        raise StoreError(f"{path} is there already; expected a folder without shards of this name: remove them or pass --name")
    partial = path.with_suffix(".partial")
    keys: dict[str, Path] = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            writer = TarWriter(file, mtime=0, encoder=False)
            for image, label in samples:
                relative = image.relative_to(root)
                key = relative.with_suffix("").as_posix().replace(".", "_")
                if key in keys:
                    raise ShardError(f"shard {path.stem}: key {key!r} would appear twice, for {keys[key]} and {image}; rename one of the files")
                keys[key] = image
                note = {"label": label, "class": classes[label], "filename": relative.as_posix()}
                extension = image.suffix.lower().lstrip(".")
                writer.write(
                    {
                        "__key__": key,
                        extension: image.read_bytes(),
                        "cls": str(label).encode(),
                        "json": json.dumps(note, sort_keys=True).encode(),
                    }
                )
                bar.update()
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(f"{path} can't be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size
